"""Checks that a gradient and the state of an optimizer fit their parameter, before anything is written.

torch's fused kernels take the sizes of all tensors from the parameters: what does not fit would be read past its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = (
    "load the state that belongs to this parameter, or build the optimizer anew; after a model was cast or moved, "
    "optimizer.load_state_dict(optimizer.state_dict()) brings the state to its parameters"
)


def check_parameter(name: str, parameter: Tensor, *, clips: bool = False) -> None:
    """Raise unless a parameter, and its gradient, are real numbers in memory of their own.

    Args:
        name: How the error calls the parameter.
        parameter: With a gradient.
        clips: Whether the gradient will be clipped in place.

    Raises:
        RuntimeError: If the gradient is sparse.
        ValueError: If the gradient is not one of this parameter, or one of the two cannot be read or written.
    """
    gradient: Any = parameter.grad
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"Lamb takes dense gradients only, got a {gradient.layout} one for {name} of shape "
            f"{tuple(parameter.shape)}; build the embedding that makes it with sparse=False"
        )
    if parameter.dtype not in _DTYPES:
        raise ValueError(f"{name} is of {parameter.dtype}; LAMB updates {', '.join(map(str, _DTYPES))}")
    if not _is_like(parameter, gradient):
        raise ValueError(f"the gradient of {name} is {_shown(gradient)}, and the parameter {_shown(parameter)}")
    for what, tensor, is_written in ((name, parameter, True), (f"the gradient of {name}", gradient, clips)):
        if problem := _problem_of_memory(tensor):
            raise ValueError(f"{what} has shape {tuple(tensor.shape)} but {problem}")
        if is_written and not tensor.is_contiguous() and _shares_elements(tensor):
            raise ValueError(
                f"elements of {what} share memory, as after expand(): give it memory of its own by clone()"
            )


def check_state(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless a state is what LAMB keeps for a parameter: ``step`` and both moments.

    Args:
        name: How the error calls the parameter.
        parameter: The parameter; one that is distributed has a state that is distributed alike.
        state: ``step`` of shape ``()`` in float32, ``exp_avg`` and ``exp_avg_sq`` contiguous and like the parameter.
    """
    if state.keys() != {"step", *MOMENTS}:
        listed = ", ".join(map(str, state)) or "nothing"
        raise ValueError(f"the state of {name} holds {listed}, and LAMB's is step, {', '.join(MOMENTS)}; {_REMEDY}")
    for key in MOMENTS:
        moment = state[key]
        if not _is_like(parameter, moment):
            raise ValueError(f"{key} of {name} is {_shown(moment)}, and the parameter {_shown(parameter)}; {_REMEDY}")
        if not moment.is_contiguous() or _problem_of_memory(moment):
            raise ValueError(f"{key} of {name} does not lie in memory as LAMB keeps it, contiguous; {_REMEDY}")
    step = state["step"]
    wanted = (torch.Size(), torch.float32, parameter.device)
    if not isinstance(step, Tensor) or (step.shape, step.dtype, step.device) != wanted:
        raise ValueError(
            f"step of {name} is {_shown(step)}, and LAMB's is torch.float32 of shape () on {parameter.device}; "
            f"{_REMEDY}"
        )


def _is_like(parameter: Tensor, other: Any) -> bool:
    """Return whether a tensor has the shape, dtype and device of a parameter, and is distributed alike."""
    if not isinstance(other, Tensor) or isinstance(other, DTensor) != isinstance(parameter, DTensor):
        return False
    if isinstance(parameter, DTensor) and not _is_like(parameter.to_local(), other.to_local()):  # type: ignore[attr-defined]
        return False
    return (other.shape, other.dtype, other.device, other.layout) == (
        parameter.shape,
        parameter.dtype,
        parameter.device,
        parameter.layout,
    )


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r} of type {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


def _shares_elements(tensor: Tensor) -> bool:
    """Return whether two indices of a tensor may be one place in memory."""
    reach = 0  # how far the axes with smaller strides go
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _problem_of_memory(tensor: Tensor) -> str:
    """Return what is wrong if the storage of a tensor is smaller than its shape and strides say."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not local.numel():
        return ""
    if local.is_contiguous():
        last = local.storage_offset() + local.numel() - 1
    else:
        last = local.storage_offset() + sum(s * (n - 1) for s, n in zip(local.stride(), local.shape, strict=True))
    has_memory = local.untyped_storage().nbytes() >= (last + 1) * local.element_size()
    return "" if has_memory else "no memory for that: its storage was resized"
