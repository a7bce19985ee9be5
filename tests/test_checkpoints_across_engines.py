"""Checkpoints across engines: saved under one, resumed under another and with another number of processes, exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SAVED, STEPS, checkpoint_trainer, contents, rewritten
from launching import launch
from training_cases import losses

from hf_fnl import FactorizedBertForPreTraining
from hf_fnl.training.checkpoints.consolidate import consolidate

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("checkpoints across engines")

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
WORKER = Path(__file__).parent / "workers" / "checkpoint_runs.py"
BF16 = {"bf16": True, "learning_rate": 1e-3}

# Name of a run: its engine, its format, what it goes on from, other options. "one" is a single process, this one.
RUNS = {
    "ddp": ("ddp", "full", None, {}),
    "fsdp2": ("fsdp2", "sharded", None, {"async_save": True}),
    "zero2": ("zero2", "full", None, {"async_save": True}),
    "zero3": ("zero3", "sharded", None, {}),
    "zero1 in bf16": ("zero1", "sharded", None, BF16),
    "ddp to ddp": ("ddp", "sharded", "ddp", {}),
    "ddp to fsdp2": ("fsdp2", "full", "ddp", {}),
    "fsdp2 to zero2": ("zero2", "sharded", "fsdp2", {}),
    "zero3 to zero1": ("zero1", "full", "zero3", {}),
    "one to zero2": ("zero2", "sharded", "one", {}),
    "zero1 to zero3 in bf16": ("zero3", "full", "zero1 in bf16", BF16),
    "ddp to one": ("one", "full", "ddp", {}),
    "fsdp2 to one": ("one", "sharded", "fsdp2", {}),
    "zero2 to one": ("one", "sharded", "zero2", {}),
    "zero3 to one": ("one", "full", "zero3", {}),
}
FAILING = {"full disk": False, "full disk in the background": True}
RESUMED = [name for name, (_, _, resume, _) in RUNS.items() if resume]


def run_here(folder: Path, form: str, resume: str | None) -> None:
    """A run of one process, with what a worker would write of it."""
    sys.path.insert(0, str(WORKER.parent))
    from checkpoint_runs import Rewrite

    trainer = checkpoint_trainer(folder, "one", 1, checkpoint_format=form)
    if resume:
        trainer.add_callback(Rewrite(trainer))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, folder / "weights.pt")
    (folder / "facts.json").write_text(json.dumps({"losses": losses(trainer)}))


def run_jobs(root: Path, jobs: list[dict]) -> None:
    plan = root / "plan.json"
    plan.write_text(json.dumps(jobs))
    launch(WORKER, str(plan))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder in which all runs were done, each under its name."""
    root = tmp_path_factory.mktemp("runs")
    run_here(root / "one", "full", None)
    jobs = [
        {
            "folder": str(root / name),
            "engine": engine,
            "resume": resume and str(root / resume / f"checkpoint-{SAVED}"),
            "options": {"checkpoint_format": form, **options},
        }
        for name, (engine, form, resume, options) in RUNS.items()
        if engine != "one"
    ]
    for way, background in FAILING.items():
        options = {"async_save": background, "checkpoint_format": "sharded", "save_steps": 1, "max_steps": 40}
        jobs.append({"folder": str(root / way), "engine": "ddp", "fails_on": 1, "options": options})
    run_jobs(root, jobs)
    for name, (engine, form, resume, _) in RUNS.items():
        if engine == "one":
            run_here(root / name, form, str(root / resume / f"checkpoint-{SAVED}"))
    return root


def facts(root: Path, name: str) -> dict:
    for path in (root / name).glob("error-*.txt"):
        pytest.fail(f"{name}: {path.read_text()[-2000:]}")
    return json.loads((root / name / "facts.json").read_text())


@pytest.mark.parametrize("name", RESUMED)
def test_what_is_taken_up_is_what_was_saved_bit_by_bit(root, name):
    facts(root, name)
    saved = contents(root / RUNS[name][2] / f"checkpoint-{SAVED}")
    taken = contents(rewritten(root / name))
    assert taken.keys() == saved.keys()
    assert {key.partition("/")[0] for key in saved} >= {"weight", "exp_avg", "exp_avg_sq", "step"}
    for key, tensor in saved.items():
        assert torch.equal(taken[key], tensor), key


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" not in name])
def test_losses_and_weights_are_those_of_one_undisturbed_process(root, name):
    assert len(facts(root, name)["losses"]) == STEPS
    assert facts(root, name)["losses"] == pytest.approx(facts(root, "one")["losses"], rel=1e-5)
    weights, expected = (torch.load(root / run / "weights.pt") for run in (name, "one"))
    for key in expected:
        if not key.endswith("key.bias"):  # its gradient is rounding only, which Adam blows up
            torch.testing.assert_close(weights[key], expected[key], rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")


def test_a_run_in_bf16_goes_on_from_its_master_weights(root):
    saved = contents(root / "zero1 in bf16" / f"checkpoint-{SAVED}")
    masters = {key.partition("/")[2]: tensor for key, tensor in saved.items() if key.startswith("master/")}
    assert masters
    for name, master in masters.items():
        assert master.dtype is torch.float32
        assert torch.equal(master.bfloat16(), saved[f"weight/{name}"]), name
    expected = facts(root, "zero1 in bf16")["losses"]
    assert facts(root, "zero1 to zero3 in bf16")["losses"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["fsdp2", "zero3", "zero1 in bf16"])
def test_a_consolidated_checkpoint_is_a_models_folder(root, tmp_path, name):
    facts(root, name)
    checkpoint = root / name / f"checkpoint-{SAVED}"
    assert not (checkpoint / "model.safetensors").exists()
    found = consolidate(checkpoint, tmp_path / "model", file_bytes=12_000)
    assert len(found["files"]) > 1
    loaded = FactorizedBertForPreTraining.from_pretrained(tmp_path / "model")
    saved = contents(checkpoint)
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter.reshape(-1), saved[f"weight/{key}"].to(parameter.dtype)), key


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" not in name])
def test_the_final_model_is_whole_on_every_engine(root, name):
    facts(root, name)
    loaded = FactorizedBertForPreTraining.from_pretrained(root / name / "final")
    weights = torch.load(root / name / "weights.pt")
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[key]), key


@pytest.mark.parametrize("way", FAILING)
def test_a_full_disk_of_one_process_is_an_error_of_both(root, way):
    there, here = ((root / way / f"error-{number}.txt").read_text() for number in (0, 1))
    message = f"RuntimeError: could not write {root / way / 'checkpoint-1'}: "
    assert f"{message}process 1: OSError: [Errno 28] No space left on device; earlier checkpoints are as they" in there
    assert message in here
    assert "No space left on device; earlier" in here
    assert list((root / way).glob("checkpoint-*")) == []
