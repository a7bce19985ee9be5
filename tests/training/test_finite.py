"""A loss, gradient or weight that is not finite stops a training or skips a step, and is never saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import launch, launches
from safetensors.torch import load_file
from torch import Tensor, nn
from training_cases import losses, tiny_trainer
from transformers import TrainerCallback

from hf_fnl import FLAMBeTrainer
from hf_fnl.training.engines import check_engine, innermost
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


HARMS: dict[str, tuple[Harm, str]] = {
    "loss-nan": (nan_loss, "loss"),
    "loss-infinite": (infinite_loss, "loss"),
    "gradient-nan": (one_nan_gradient, "gradient norm"),
    "gradient-infinite": (infinite_gradient, "loss|gradient norm"),
}


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


def weights(trainer: FLAMBeTrainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class Recorder(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self.after.append({name: p.detach().clone() for name, p in model.named_parameters()})


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "max_grad_norm", "optim"),
    [
        ("loss-nan", 0.0, "flambe"),
        ("loss-infinite", None, "adamw_torch"),
        ("gradient-nan", 1.0, "flambe"),
        ("gradient-infinite", 0.0, "adamw_torch"),
    ],
)
def test_by_default_the_training_stops_at_that_step(tmp_path, name, max_grad_norm, optim):
    harm, what = HARMS[name]
    options = {"max_grad_norm": max_grad_norm, "optim": optim, "frobenius_decay": ["ov"], "save_strategy": "steps"}
    trainer = harmed(tmp_path, harm, 3, save_steps=1, **options)
    recorder = Recorder()
    trainer.add_callback(recorder)
    with pytest.raises(ValueError, match=rf"the ({what}) of step 3 is not finite.*nonfinite_gradient=skip"):
        trainer.train()
    assert_equal(weights(trainer), recorder.after[1])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2/model.safetensors").values())


@pytest.mark.parametrize(
    ("harm", "optim"), [(infinite_loss, "flambe"), (one_nan_gradient, "adamw_torch"), (infinite_gradient, "sgd")]
)
def test_a_step_that_is_skipped_changes_nothing(tmp_path, harm, optim):
    """No parameter, no moment and no step of the optimizer; also where decay acts by itself."""
    trainer = harmed(tmp_path, harm, 3, optim=optim, frobenius_decay=["ov"], nonfinite_gradient="skip")
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert_equal(recorder.after[2], recorder.after[1])
    assert not all(torch.equal(recorder.after[3][name], value) for name, value in recorder.after[2].items())
    assert trainer.state.global_step == 6
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert [entry.get("skipped_steps") for entry in trainer.state.log_history if "loss" in entry][1:] == [None] + [
        1
    ] * 4
    steps = {float(s["step"]) for s in innermost(trainer.optimizer).state.values() if "step" in s}
    assert steps in ({5.0}, set())


@pytest.mark.parametrize(("part", "action"), [(1, "stop"), (0, "skip")])
def test_one_batch_of_several_is_enough(tmp_path, part, action):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "nonfinite_gradient": action}
    trainer = harmed(tmp_path, infinite_loss, 2, part=part, **options)
    recorder = Recorder()
    trainer.add_callback(recorder)
    if action == "stop":
        with pytest.raises(ValueError, match="the loss of step 2"):
            trainer.train()
        assert len(recorder.after) == 1
    else:
        trainer.train()
        assert_equal(recorder.after[1], recorder.after[0])


def test_a_training_of_skipped_steps_only_fails(tmp_path):
    trainer = tiny_trainer(tmp_path, nonfinite_gradient="skip")
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, *args, **kwargs: infinite_loss(trainer, model, compute(model, *args, **kwargs))
    with pytest.raises(ValueError, match="all 6 steps were skipped"):
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


def test_an_unknown_action_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nonfinite_gradient must be one of stop, skip, got 'ignore'"):
        tiny_trainer(tmp_path, nonfinite_gradient="ignore")


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (2, {"nonfinite_gradient": "skip"}, "nonfinite_gradient=skip does not work with DeepSpeed"),
        (3, {"optim": "sgd", "frobenius_decay": ["ov"], "frobenius_mode": "coupled"}, "ZeRO stage 3 clips"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(tmp_path, stage, options, message):
    config: dict[str, Any] = {"zero_optimization": {"stage": stage}, "gradient_clipping": 1.0}
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config), zero_stage=stage)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(state=state, is_main_process=True)
    trainer = tiny_trainer(tmp_path)
    args = type(trainer.args)(str(tmp_path), use_cpu=True, report_to="none", **options)
    with pytest.raises(ValueError, match=message):
        check_engine(accelerator, trainer.model, args)


ENGINES = {
    "ddp": ("MULTI_CPU", {"stop": [2.0], "skip": [5.0]}),
    "fsdp2": ("FSDP", {"stop": [2.0], "skip": [5.0]}),
    "zero2": ("DEEPSPEED", {"stop": [3.0]}),  # which has stepped by then
}


@launches
def test_all_processes_decide_alike(tmp_path):
    """The loss is infinite in the second of two processes only."""
    runs = [f"{engine}/{action}" for engine, (_, steps) in ENGINES.items() for action in steps]
    codes, output = launch(Path(__file__).parents[1] / "support" / "workers" / "nonfinite.py", str(tmp_path), *runs)
    assert codes == [0, 0], output
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for run in runs:
        engine, action = run.split("/")
        kind, steps = ENGINES[engine]
        found = first[run]
        assert found["engine"] == f"DistributedType.{kind}"
        assert found["steps"] == steps[action]
        assert found["global_step"] == (2 if action == "stop" else 6)
        assert ("the loss of step 3 is not finite" in found["error"]) == (action == "stop")
