"""The learning-rate schedule of the translation recipe, by itself and in a Trainer."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from hf_fnl.training import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.training.optimizers import inverse_sqrt


class Line(nn.Module):
    """The smallest model that a Trainer takes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, x, labels=None):
        return {"loss": (x @ self.weight).square().mean()}


def rates(folder, steps: int, *, trainings: int = 1, **options) -> list[float]:
    """The rates of all updates of one training after the other, as the optimizer had them."""
    args = FLAMBeTrainingArguments(
        str(folder), max_steps=steps, optim="sgd", use_cpu=True, report_to=[], save_strategy="no", **options
    )
    rows = [{"x": torch.ones(3), "labels": 0}] * 8
    trainer = FLAMBeTrainer(Line(), args, train_dataset=rows)
    used: list[float] = []
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda opt, args, kwargs: used.append(opt.param_groups[0]["lr"]))
    for _ in range(trainings):
        trainer.train()
    return used


@pytest.mark.parametrize("start", [1.0, 0.25, 0.0])
def test_inverse_square_root_begins_at_a_share_of_the_rate(start):
    factor = inverse_sqrt(4000, start)
    assert factor(0) == start
    assert factor(2000) == (1 + start) / 2
    assert factor(4000) == 1
    assert factor(16000) == 0.5
    assert all(later <= earlier for earlier, later in pairwise(map(factor, range(4000, 4100))))


def test_a_trainer_takes_the_schedule_of_khodak_et_al_for_translation(tmp_path):
    options = {"lr_scheduler_type": "inverse_sqrt", "warmup_start": 1.0, "warmup_steps": 3, "learning_rate": 0.25}
    expected = [0.25, 0.25, 0.25, 0.25, 0.25 * math.sqrt(3 / 4), 0.25 * math.sqrt(3 / 5)]
    assert rates(tmp_path, 6, **options) == pytest.approx(expected, rel=1e-12)


def test_a_second_training_has_the_schedule_from_its_beginning(tmp_path):
    options = {"lr_scheduler_type": "inverse_sqrt", "warmup_start": 0.5, "warmup_steps": 2, "learning_rate": 1.0}
    used = rates(tmp_path, 4, trainings=2, **options)
    assert used[4:] == used[:4] == pytest.approx([0.5, 0.75, 1.0, math.sqrt(2 / 3)])


def test_a_trainer_without_these_options_has_the_schedule_of_transformers(tmp_path):
    expected = [0.0, 0.5, 1.0, 0.5 * 1.0]  # linear: warm-up over two updates, then to zero over two
    assert rates(tmp_path, 4, learning_rate=1.0, warmup_steps=2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_start": 1.0, "warmup_steps": 3}, "is for lr_scheduler_type=inverse_sqrt, got 1.0 with linear"),
        (
            {"warmup_start": 2.0, "warmup_steps": 3, "lr_scheduler_type": "inverse_sqrt"},
            r"warmup_start must be in \[0, 1\]",
        ),
        ({"warmup_start": 1.0, "lr_scheduler_type": "inverse_sqrt"}, "warmup_start=1.0 needs warmup_steps"),
    ],
)
def test_schedules_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FLAMBeTrainingArguments(str(tmp_path), use_cpu=True, **options)
