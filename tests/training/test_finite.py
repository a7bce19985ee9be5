"""A loss, gradient or weight that is not finite stops a training, and is never saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, launches
from safetensors.torch import load_file
from torch import Tensor, nn
from training_cases import tiny_trainer
from transformers import TrainerCallback

from hf_fnl import FLAMBeTrainer
from hf_fnl.training.finite import check_finite

Harm = Callable[[FLAMBeTrainer, nn.Module, Tensor], Tensor]


def nan_loss(trainer: FLAMBeTrainer, model: nn.Module, loss: Tensor) -> Tensor:
    return loss * math.nan


def infinite_loss(trainer: FLAMBeTrainer, model: nn.Module, loss: Tensor) -> Tensor:
    """With gradients that are finite."""
    return loss + math.inf


def one_nan_gradient(trainer: FLAMBeTrainer, model: nn.Module, loss: Tensor) -> Tensor:
    parameter = next(model.parameters())
    return loss + (parameter.flatten()[0] * 0).sqrt()  # whose derivative is 0 / 0


def infinite_gradient(trainer: FLAMBeTrainer, model: nn.Module, loss: Tensor) -> Tensor:
    parameter = next(model.parameters()).flatten()[0]
    return loss + (parameter - parameter.detach()).abs().sqrt() * 0 + (parameter - parameter.detach()) * math.inf


def harmed(folder: Path, harm: Harm, at: int, *, part: int = 0, **options: Any) -> FLAMBeTrainer:
    """A trainer whose step ``at``, from 1, has a loss that ``harm`` changed in one of its batches."""
    trainer = tiny_trainer(folder, **options)
    compute, seen = trainer.compute_loss, []

    def compute_loss(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = compute(model, *args, **kwargs)
        seen.append(trainer.state.global_step)
        is_part = seen.count(at - 1) == part + 1
        return harm(trainer, model, loss) if trainer.state.global_step == at - 1 and is_part else loss

    trainer.compute_loss = compute_loss
    return trainer


@pytest.mark.parametrize(
    ("harm", "max_grad_norm", "optim", "what"),
    [
        (nan_loss, 0.0, "flambe", "loss"),
        (infinite_loss, None, "adamw_torch", "loss"),
        (one_nan_gradient, 1.0, "flambe", "gradient norm"),
        (infinite_gradient, 0.0, "adamw_torch", "loss|gradient norm"),
    ],
)
def test_the_training_ends_and_saves_nothing_of_that_step(tmp_path, harm, max_grad_norm, optim, what):
    options = {"max_grad_norm": max_grad_norm, "optim": optim, "frobenius_decay": ["ov"], "save_strategy": "steps"}
    trainer = harmed(tmp_path, harm, 3, save_steps=1, **options)
    with pytest.raises(ValueError, match=rf"the ({what}) is not finite at step 3.*Lower learning_rate"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2/model.safetensors").values())


def test_one_batch_of_several_is_enough_and_the_next_log_tells(tmp_path):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 3}
    trainer = harmed(tmp_path, infinite_loss, 2, part=1, **options)
    with pytest.raises(ValueError, match="the loss is not finite at step 3"):
        trainer.train()


class Breaks(TrainerCallback):
    """Makes a weight NaN after a step, as an optimizer might."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            with torch.no_grad():
                next(iter(model.parameters())).view(-1)[-1] = math.nan


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer.add_callback(Breaks(3))
    name = next(iter(dict(trainer.model.named_parameters())))
    with pytest.raises(ValueError, match=rf"{name} hold NaN or Inf at step 3.*nothing of that is saved"):
        trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept[-1] == "checkpoint-2"
    again = tiny_trainer(tmp_path, save_strategy="no", max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_training_that_ends_with_such_weights_says_so(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.add_callback(Breaks(6))
    with pytest.raises(ValueError, match="NaN or Inf after step 6"):
        trainer.train()


def test_a_model_with_such_weights_is_not_saved_over_another(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(math.inf)
    count = len(list(trainer.model.parameters()))
    with pytest.raises(ValueError, match=rf"and {count - 1} others hold NaN or Inf and are to be saved"):
        trainer.save_model()
    with pytest.raises(ValueError, match="NaN or Inf"):
        trainer.save_model(str(tmp_path / "new"))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_what_zero3_pads_the_last_range_with_is_no_weight(tmp_path):
    """Every process holds ranges of one length, of which the last one ends in memory that nobody has written to."""
    trainer = tiny_trainer(tmp_path)
    layer = nn.Linear(1, 5)
    held = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, math.nan])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        held.ds_numel = 6
        layer.bias.ds_tensor, layer.bias.ds_numel, layer.bias.ds_process_group = held, 5, None
        check_finite(layer, trainer.accelerator, "now")
        held[4] = math.inf
        with pytest.raises(ValueError, match="bias hold NaN or Inf now"):
            check_finite(layer, trainer.accelerator, "now")
    finally:
        torch.distributed.destroy_process_group()


ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}


@launches
def test_all_processes_decide_alike(tmp_path):
    """The loss is infinite in the second of two processes only."""
    codes, output = launch(Path(__file__).parents[1] / "support" / "workers" / "nonfinite.py", str(tmp_path), *ENGINES)
    assert codes == [0, 0], output
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for engine, kind in ENGINES.items():
        assert first[engine]["engine"] == f"DistributedType.{kind}"
        assert "the loss is not finite at step 3" in first[engine]["error"]
