"""A process killed under torchrun costs some steps and nothing else; one process goes on with what two have begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launching import launches
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training_cases import losses, tiny_trainer

pytestmark = launches


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(tmp_path, monkeypatch):
    """By what torchrun calls, with processes that are forked from one that has imported what they need."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "support" / "workers")
    from fault_elastic import LOST_AT, SAVE_STEPS, STEPS, main

    folder = tmp_path / "two"
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # as in run_scripts/launch/elastic.sh
    places = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "elastic"}
    processes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 3, "start_method": "forkserver"}
    elastic_launch(LaunchConfig(**places, **processes, monitor_interval=0.1), main)(str(folder), "4")
    events = [json.loads(line) for line in (folder / "events-0.jsonl").read_text().splitlines()]
    assert [event["begin"] for event in events if "begin" in event] == [0, LOST_AT - SAVE_STEPS]
    undisturbed = tiny_trainer(tmp_path / "one", max_steps=STEPS)
    undisturbed.train()
    expected = dict(enumerate(losses(undisturbed), start=1))
    found = [(event["step"], event["loss"]) for event in events if "step" in event]
    assert len(found) == STEPS + SAVE_STEPS
    assert all(loss == pytest.approx(expected[step], rel=1e-4) for step, loss in found)
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    (folder / "events-0.jsonl").unlink()
    main(str(folder), "8")
    begin, *after = [json.loads(line) for line in (folder / "events-0.jsonl").read_text().splitlines()]
    assert begin["begin"] == STEPS // SAVE_STEPS * SAVE_STEPS
    assert [event["loss"] for event in after] == pytest.approx(list(expected.values())[begin["begin"] :], rel=1e-4)
