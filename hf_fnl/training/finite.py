"""Losses, gradients and weights that are NaN or infinite end a training, before any of that is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.layers.partitioned import is_partitioned
from hf_fnl.optim.sharding import to_local
from hf_fnl.optim.zero import zero3_range
from hf_fnl.training.engines import is_sharded


class FiniteSteps(TrainerCallback):
    """Stops a training before a step by a non-finite loss or gradient, in all processes alike.

    Where losses are scaled (fp16), the scaler skips steps that overflow, and this leaves them to it. DeepSpeed steps by
    itself, before this can look: the training is stopped then, and nothing more is saved. After the last step weights
    are checked.

    Args:
        accelerator: Returns that of the Trainer.
    """

    def __init__(self, accelerator: Callable[[], Accelerator]) -> None:
        self._accelerator = accelerator
        self._losses: list[Tensor] = []

    def note(self, loss: Tensor) -> None:
        """Remember a loss of the step that is being computed."""
        self._losses.append(loss.detach())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the losses of the step before."""
        self._losses.clear()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Raise a ``ValueError`` if what was computed is not finite."""
        accelerator = self._accelerator()
        if accelerator.scaler is not None:
            return
        stepped = accelerator.distributed_type == DistributedType.DEEPSPEED
        norm = _norm_of_deepspeed(accelerator) if stepped else _norm_of(model)
        found = [value for value in (*self._losses, norm) if value is not None]
        flags = torch.tensor([not bool(value) for value in _are_finite(found, accelerator.device)])
        of_losses, of_gradient = flags[: len(self._losses)].any(), flags[len(self._losses) :].any()
        both = torch.stack([of_losses, of_gradient]).to(accelerator.device, torch.float32)
        wrong = accelerator.reduce(both, reduction="sum").tolist()
        if not any(wrong):
            return
        what = "loss" if wrong[0] else "gradient norm"
        raise ValueError(
            f"the {what} of step {state.global_step + 1} is not finite; the training ends here, and what was saved "
            "before is left as it is. Lower learning_rate, or look at the data"
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Raise a ``ValueError`` if a weight is not finite."""
        check_finite(model, self._accelerator(), f"after step {state.global_step}")


def _norm_of(model: nn.Module) -> Tensor | None:
    """The norm of what this process holds of the gradients."""
    gradients = [to_local(p.grad) for p in model.parameters() if p.grad is not None]
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    return torch.nn.utils.get_total_norm(dense) if dense else None


def _norm_of_deepspeed(accelerator: Accelerator) -> Tensor | None:
    """The norm that the engine computed, where it does; in fp16 it skips steps that overflow."""
    wrapped: Any = accelerator.deepspeed_engine_wrapped
    if wrapped is None or wrapped.engine.fp16_enabled():
        return None
    norm = wrapped.engine.get_global_grad_norm()
    return None if norm is None else torch.as_tensor(norm)


def _are_finite(values: list[Tensor], device: torch.device) -> list[bool]:
    """Whether each is finite, by one look at the device."""
    if not values:
        return []
    finite: list[bool] = torch.stack([value.isfinite().all().to(device) for value in values]).tolist()
    return finite


@torch.no_grad()
def check_finite(model: nn.Module, accelerator: Accelerator, when: str) -> None:
    """Raise a ``ValueError`` that names a parameter which holds NaN or Inf, in all processes alike.

    Args:
        model: Its parameters may be divided among processes; then all of them must call this.
        accelerator: Of the training.
        when: What the error says of the time.
    """
    named = {name: _held(p) for name, p in model.named_parameters()}
    held = {name: p for name, p in named.items() if p.is_floating_point() and not p.is_meta}
    device = accelerator.device
    ranges = [torch.stack(p.detach().aminmax()) if p.numel() else p.new_zeros(1) for p in held.values()]
    wrong = torch.tensor([not finite for finite in _are_finite(ranges, device)], dtype=torch.float32, device=device)
    if is_sharded(accelerator):
        wrong = accelerator.reduce(wrong, reduction="sum")
    if names := [name for name, count in zip(held, wrong.tolist(), strict=True) if count]:
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise ValueError(
            f"{names[0]}{others} hold NaN or Inf {when}: nothing of that is saved, and what was saved before is left "
            "as it is"
        )


def _held(parameter: Any) -> Tensor:
    """Return the part of a parameter that this process holds; under ZeRO-3 without the padding behind its range."""
    if not is_partitioned(parameter):
        return to_local(parameter)
    start, stop = zero3_range(parameter)
    held: Tensor = parameter.ds_tensor[: stop - start]
    return held
