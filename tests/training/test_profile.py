"""Profiles of training steps: the training stays as it is, and the ranges are those of the steps asked for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from training_cases import losses, tiny_trainer
from transformers import TrainerControl

from hf_fnl import FLAMBeTrainingArguments
from hf_fnl.training.profiling import TABLE_FILE, TRACE_FILE, ProfilerCallback, parse_steps

TRAININGS = {
    "lamb": ("2", [4, 5], {"optim": "lamb"}),
    "penalty": (
        "1:2",
        [1, 2],
        {"optim": "adamw_torch", "frobenius_decay": ["ov"], "frobenius_mode": "penalty"},
    ),
    "accumulation": (
        "3:9",
        [3, 4, 5, 6],
        {
            "optim": "sgd",
            "frobenius_decay": ["ov"],
            "frobenius_mode": "coupled",
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
        },
    ),
}


@pytest.mark.parametrize(("asked", "steps", "options"), TRAININGS.values(), ids=TRAININGS)
def test_a_profiled_training_is_the_same_training(tmp_path, capfd, asked, steps, options):
    options = {"max_steps": 6, **options}
    plain = tiny_trainer(tmp_path / "plain", **options)
    plain.train()
    profiled = tiny_trainer(tmp_path / "profiled", profile_steps=asked, **options)
    profiled.train()
    assert losses(profiled) == losses(plain)
    events = json.loads((tmp_path / "profiled" / TRACE_FILE).read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    passes = len(steps) * options.get("gradient_accumulation_steps", 1)
    assert names.count("training step") == len(steps)
    assert names.count("forward") == names.count("forward and backward") == passes
    assert sum(name.startswith("enumerate(DataLoader)") for name in names) >= passes - 1
    assert sum(name.startswith("Optimizer.step") for name in names) == len(steps)
    table = (tmp_path / "profiled" / TABLE_FILE).read_text()
    assert table.startswith(f"steps {steps[0]} to {steps[-1]}, milliseconds")
    milliseconds = {line[:22].strip(): float(line[22:32]) for line in table.splitlines()[1:7]}
    assert milliseconds["forward"] < milliseconds["forward and backward"]
    assert milliseconds["forward and backward"] + milliseconds["optimizer"] < milliseconds["step"]
    assert (milliseconds["decay"] > 0) == (options["optim"] != "lamb")
    assert f"steps {steps[0]} to" in capfd.readouterr().out


def test_a_training_that_ends_before_says_so(tmp_path, caplog):
    tiny_trainer(tmp_path, num_train_epochs=1, max_steps=-1, profile_steps="99:99").train()
    assert "no step was profiled" in caplog.text
    assert not (tmp_path / TABLE_FILE).exists()


def test_other_processes_than_the_first_profile_nothing():
    callback = ProfilerCallback("1:2")
    callback.on_train_begin(SimpleNamespace(process_index=1), SimpleNamespace(global_step=0), None)
    callback.on_step_end(SimpleNamespace(process_index=1), SimpleNamespace(global_step=1), TrainerControl())
    assert callback._profiler is None


@pytest.mark.parametrize("text", ["0", "-1", "3:2", "0:4", "a", "1:", "1:2:3"])
def test_steps_that_there_are_not_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match=f"profile_steps must be N or FROM:TO, steps counted from 1, got {text}"):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), profile_steps=text)


def test_steps_behind_the_end_are_refused(tmp_path):
    assert parse_steps("4") == (4, 7, True)
    with pytest.raises(ValueError, match="profile_steps=4 begins at step 4 of 3"):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), profile_steps="4", max_steps=3)
