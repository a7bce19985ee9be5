"""A process killed under torchrun costs some steps and nothing else; one process goes on with what two have begun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import losses, tiny_trainer

WORKER = Path(__file__).parents[1] / "support" / "workers" / "fault_elastic.py"
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3"]


def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(WORKER.parent))
    from fault_elastic import LOST_AT, SAVE_STEPS, STEPS, main

    folder = tmp_path / "two"
    command = [sys.executable, *LAUNCH, "--monitor-interval=0.1", str(WORKER), str(folder), "4"]
    # As in run_scripts/launch/elastic.sh.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
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
