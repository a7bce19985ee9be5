"""Losses, gradients and weights that are NaN or infinite end a training, before any of that is saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_fnl.layers.partitioned import is_partitioned
from hf_fnl.optim.sharding import to_local
from hf_fnl.optim.zero import zero3_range
from hf_fnl.training.engines import is_sharded


def check_logged(logs: dict[str, Any], step: int) -> None:
    """Raise a ``ValueError`` if the loss or the gradient norm that a Trainer logs is not finite.

    Both are those of all processes, which decide alike. A loss is the mean since the last log.
    """
    for name, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if not math.isfinite(logs.get(name, 0.0)):
            raise ValueError(
                f"the {what} is not finite at step {step}; the training ends here, and what was saved before is left "
                "as it is. Lower learning_rate, or look at the data"
            )


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
    ranges = [torch.stack(p.aminmax()) if p.numel() else p.new_zeros(2) for p in held.values()]
    wrong = torch.stack([each.isfinite().all().to(accelerator.device) for each in ranges]).logical_not().float()
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
