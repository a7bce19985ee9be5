"""Checkpoints under every engine: what the same one goes on from exactly, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SAVED, STEPS
from launching import launch

from hf_fnl import FactorizedBertForPreTraining
from hf_fnl.training.checkpoints import MANIFEST_FILE, checkpoints, fault

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("checkpoints across engines")

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
WORKER = Path(__file__).parents[1] / "support" / "workers" / "checkpoint_runs.py"

# Name of a run: its processes, its engine, what it goes on from. One process is this one.
RUNS = {
    "one": (1, "one", None),
    "ddp": (2, "ddp", None),
    "fsdp2": (2, "fsdp2", None),
    "shards": (2, "fsdp2-shards", None),
    "zero2": (2, "zero2", None),
    "zero3": (2, "zero3", None),
    "ddp to ddp": (2, "ddp", "ddp"),
    "fsdp2 to fsdp2": (2, "fsdp2", "fsdp2"),
    "zero2 to zero1": (2, "zero1", "zero2"),
    "zero3 to zero3": (2, "zero3", "zero3"),
    "fsdp2 to shards": (2, "fsdp2-shards", "fsdp2"),
    "shards to ddp": (2, "ddp", "shards"),
    "ddp to zero2": (2, "zero2", "ddp"),
    "zero2 to zero3": (2, "zero3", "zero2"),
    "shards to hsdp": (4, "hsdp", "shards"),
    "zero2 to four": (4, "zero2", "zero2"),
    "ddp to one": (1, "one", "ddp"),
    "zero3 to one": (1, "one", "zero3"),
}
REFUSED = {
    "fsdp2 to shards": "which needs fsdp_state_dict_type=FULL_STATE_DICT in the accelerate config",
    "shards to ddp": "which is of FSDP where this run is of one process or DDP: train on as it was begun, or begin",
    "ddp to zero2": "which is of one process or DDP where this run is of DeepSpeed",
    "zero2 to zero3": "which is of another stage of ZeRO than 3",
    "zero2 to four": "which is of 2 processes, and this run has 4",
    "zero3 to one": "which is of DeepSpeed where this run is of one process or DDP",
}
EXACT = [name for name in RUNS if name not in REFUSED]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder in which all runs were done, each under its name."""
    root = tmp_path_factory.mktemp("runs")
    sys.path.insert(0, str(WORKER.parent))
    from checkpoint_runs import run

    for processes in (2, 4, 1):
        jobs = [
            {
                "folder": str(root / name),
                "engine": engine,
                "resume": resume and str(root / resume / f"checkpoint-{SAVED}"),
            }
            for name, (count, engine, resume) in RUNS.items()
            if count == processes
        ]
        if processes > 1:
            (root / "plan.json").write_text(json.dumps(jobs))
            launch(WORKER, str(root / "plan.json"), processes=processes)
            continue
        for job in jobs:
            run(job, 0, 1)
    return root


def facts(root: Path, name: str) -> dict:
    for path in (root / name).glob("error-*.txt"):
        pytest.fail(f"{name}: {path.read_text()[-2000:]}")
    return json.loads((root / name / "facts.json").read_text())


@pytest.mark.parametrize("name", EXACT)
def test_losses_and_weights_are_those_of_one_undisturbed_process(root, name):
    """Also in shards of other processes, which torch.distributed.checkpoint divides anew."""
    assert len(facts(root, name)["losses"]) == STEPS
    assert facts(root, name)["losses"] == pytest.approx(facts(root, "one")["losses"], rel=1e-5)
    weights, expected = (torch.load(root / run / "weights.pt") for run in (name, "one"))
    for key in expected:
        if not key.endswith("key.bias"):  # its gradient is rounding only, which Adam blows up
            torch.testing.assert_close(weights[key], expected[key], rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_engine_cannot_go_on_from_is_refused_by_all_processes(root, name):
    errors = [path.read_text() for path in (root / name).glob("error-*.txt")]
    assert len(errors) == RUNS[name][0]
    assert all(REFUSED[name] in error for error in errors)


@pytest.mark.parametrize("name", EXACT)
def test_checkpoints_are_complete_and_the_final_model_is_a_models_folder(root, name):
    facts(root, name)
    for checkpoint in checkpoints(root / name):
        assert fault(checkpoint) is None
        listed = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
        there = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
        assert there == {*listed, MANIFEST_FILE}
    loaded = FactorizedBertForPreTraining.from_pretrained(root / name / "final")
    weights = torch.load(root / name / "weights.pt")
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[key]), key
