"""Profiles of training steps: the training stays as it is, and the ranges are those of the steps asked for."""

import json

import pytest
from training_cases import losses, tiny_trainer

from hf_fnl import FLAMBeTrainingArguments
from hf_fnl.training.profiling import DECAY, TABLE_FILE, TRACE_FILE


@pytest.mark.parametrize(
    ("options", "decays"),
    [
        ({"optim": "lamb"}, 0),
        ({"optim": "adamw_torch", "frobenius_decay": ["ov"], "frobenius_mode": "penalty"}, 1),
        ({"optim": "sgd", "frobenius_decay": ["ov"], "frobenius_mode": "coupled"}, 1),
    ],
)
@pytest.mark.parametrize("steps", [2, 99])
def test_a_profiled_training_is_the_same_training(tmp_path, options, decays, steps):
    plain = tiny_trainer(tmp_path / "plain", max_steps=7, **options)
    plain.train()
    profiled = tiny_trainer(tmp_path / "profiled", max_steps=7, profile_steps=steps, **options)
    profiled.train()
    assert losses(profiled) == losses(plain)
    events = json.loads((tmp_path / "profiled" / TRACE_FILE).read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    profiled_steps = min(steps, 7 - 3)
    assert sum(name.startswith("Optimizer.step") for name in names) == profiled_steps
    assert names.count(DECAY) == decays * profiled_steps
    assert any(name.startswith("enumerate(DataLoader)") for name in names)
    assert "Optimizer.step" in (tmp_path / "profiled" / TABLE_FILE).read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile_steps": -1}, "profile_steps must not be negative, got -1"),
        ({"profile_steps": 4, "max_steps": 3}, "profile_steps begin after step 3, and max_steps is 3"),
    ],
)
def test_steps_that_there_are_not_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), **options)


def test_a_training_that_ends_before_says_so(tmp_path, caplog):
    tiny_trainer(tmp_path, num_train_epochs=1, max_steps=-1, per_device_train_batch_size=64, profile_steps=2).train()
    assert "no step was profiled" in caplog.text
    assert not (tmp_path / TABLE_FILE).exists()


def test_a_profile_of_an_earlier_run_is_not_taken_for_one_of_this(tmp_path, caplog):
    (tmp_path / TABLE_FILE).write_text("of an earlier run")
    tiny_trainer(tmp_path, num_train_epochs=1, max_steps=-1, per_device_train_batch_size=64, profile_steps=2).train()
    assert "no step was profiled" in caplog.text
