"""Training in rounds: what is pruned when, where it starts again, and that breaking off changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pruning_cases import SIZES, assert_same, image_trainer, state, tiny_net, tiny_resnet
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from hf_fnl.vision.lottery import train_in_rounds
from hf_fnl.vision.pruning import choose_masks

TOTAL = sum(SIZES.values())


class Recorder:
    """Makes the trainers of a run and keeps the state that each of them began with."""

    def __init__(self, folder: Path, **options) -> None:
        self.folder, self.options, self.began = folder, options, []

    def __call__(self, model: nn.Module, number: int):
        self.began.append(state(model))
        return image_trainer(self.folder / f"phase-{number}", model, **self.options)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def plain(weights: dict[str, torch.Tensor], initial: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of a model that is not pruned."""
    return {name: weights.get(name, weights.get(f"{name}_orig")) for name in initial}


@pytest.mark.parametrize("rewind", [True, False], ids=["lottery", "fine-tuning"])
def test_rounds(tmp_path, rewind):
    net, make = tiny_net(), Recorder(tmp_path)
    initial = state(net)
    metrics = train_in_rounds(net, make, 90, rounds=2, rewind=rewind)
    counts = [TOTAL, round(TOTAL * (90 / TOTAL) ** 0.5), 90]
    assert list(metrics) == ["phase-1", "phase-2", "phase-3"]
    assert [phase["parameters"]["nonzero"] for phase in metrics.values()] == [count + 18 for count in counts]
    assert_same(make.began[0], initial)
    for number in (1, 2):
        trained = tiny_net(seed=5)
        trained.load_state_dict(saved(tmp_path / f"phase-{number}"))
        masks = choose_masks(trained, counts[number], method="magnitude")
        began = make.began[number]
        assert_same({name: began[f"{name}.weight_mask"].bool() for name in masks}, masks)
        source = initial if rewind else state(trained)
        for name, value in plain(began, initial).items():
            mask = masks.get(name.removesuffix(".weight"), torch.tensor(True))
            assert torch.equal(value, source[name] * mask), name
    assert_same(state(net), saved(tmp_path / "phase-3"))
    assert state(net).keys() == initial.keys()


class BreakOff(TrainerCallback):
    """Stops a run hard, at the first step or after the checkpoint of a later one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The trained model and the metrics of a run that nothing interrupts."""
    model = tiny_resnet()
    return model, train_in_rounds(model, Recorder(tmp_path_factory.mktemp("straight")), 90, rounds=2)


@pytest.mark.parametrize(("phase", "step"), [(2, 3), (3, 0)])
def test_going_on_equals_never_having_stopped(straight, tmp_path, phase, step):
    expected, metrics = straight
    make = Recorder(tmp_path, save_strategy="steps", save_steps=3, resume_from_checkpoint="true")

    def break_off(model: nn.Module, number: int):
        trainer = make(model, number)
        if number == phase:
            trainer.add_callback(BreakOff(step))
        return trainer

    with pytest.raises(KeyboardInterrupt):
        train_in_rounds(tiny_resnet(), break_off, 90, rounds=2)
    again = tiny_resnet()
    found = train_in_rounds(again, make, 90, rounds=2)
    assert_same(state(again), state(expected))
    for name, figures in metrics.items():
        assert found[name]["parameters"] == figures["parameters"]
        assert found[name]["eval_loss"] == figures["eval_loss"]
        assert found[name] == json.loads((tmp_path / name / "metrics.json").read_text())


def test_an_earlier_run_is_not_gone_on_with_unasked(tmp_path):
    train_in_rounds(tiny_net(), Recorder(tmp_path), 90)
    with pytest.raises(ValueError, match="phase-1 holds a finished phase of an earlier run: set resume_from_check"):
        train_in_rounds(tiny_net(), Recorder(tmp_path), 90)


def test_a_checkpoint_of_one_phase_is_refused(tmp_path):
    make = Recorder(tmp_path, resume_from_checkpoint="phase-1/checkpoint-3")
    with pytest.raises(ValueError, match="checkpoint-3 belongs to one phase of several"):
        train_in_rounds(tiny_net(), make, 90)
