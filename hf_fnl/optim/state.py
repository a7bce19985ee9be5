"""Checks that a gradient and the state of an optimizer fit their parameter, before anything is written."""

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
    """Raise a ``ValueError`` unless a parameter, and its gradient, are real numbers in memory of their own.

    Args:
        name: How the error calls the parameter.
        parameter: With a gradient.
        clips: Whether the gradient will be clipped in place.

    Raises:
        RuntimeError: If the gradient is sparse.
        ValueError: If the gradient is not one of this parameter, or one of the two cannot be read or written.
    """
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"Lamb takes dense gradients only, got a {gradient.layout} one for {name} of shape "
            f"{tuple(parameter.shape)}; build the embedding that makes it with sparse=False"
        )
    if parameter.dtype not in _DTYPES:
        raise ValueError(f"{name} is of {parameter.dtype}; LAMB updates {', '.join(map(str, _DTYPES))}")
    if not _are_alike(parameter, gradient):
        raise ValueError(f"the gradient of {name} is {_shown(gradient)}, and the parameter {_shown(parameter)}")
    for what, tensor, is_written in ((name, parameter, True), (f"the gradient of {name}", gradient, clips)):
        if is_written and _shares_elements(_local(tensor)):
            raise ValueError(
                f"elements of {what} share memory, as after expand(): give it memory of its own by clone()"
            )
        if not _has_memory(_local(tensor)):
            raise ValueError(f"{what} has shape {tuple(tensor.shape)} but no memory for that: its storage was resized")


def check_state(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless a state is what LAMB keeps for a parameter: ``step`` and both moments.

    Args:
        name: How the error calls the parameter.
        parameter: The parameter; one that is distributed has a state that is distributed alike.
        state: ``step`` of shape ``()`` in float32, ``exp_avg`` and ``exp_avg_sq`` contiguous and like the parameter.
    """
    if set(state) != {"step", *MOMENTS}:
        listed = ", ".join(map(str, state)) or "nothing"
        raise ValueError(f"the state of {name} holds {listed}, and LAMB's is step, {', '.join(MOMENTS)}; {_REMEDY}")
    for key in MOMENTS:
        moment = state[key]
        if not _are_alike(parameter, moment):
            raise ValueError(f"{key} of {name} is {_shown(moment)}, and the parameter {_shown(parameter)}; {_REMEDY}")
        if not _local(moment).is_contiguous() or not _has_memory(_local(moment)):
            raise ValueError(f"{key} of {name} does not lie in memory as LAMB keeps it, contiguous; {_REMEDY}")
    step, number = state["step"], (torch.Size(), torch.float32, parameter.device)
    if not isinstance(step, Tensor) or (step.shape, step.dtype, step.device) != number:
        wanted = f"torch.float32 of shape () on {parameter.device}"
        raise ValueError(f"step of {name} is {_shown(step)}, and LAMB's is {wanted}; {_REMEDY}")


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _are_alike(parameter: Tensor, other: Any) -> bool:
    """Whether another tensor has the shape, dtype and device of a parameter, and is distributed alike."""
    if not isinstance(other, Tensor) or isinstance(other, DTensor) != isinstance(parameter, DTensor):
        return False
    local, part = _local(parameter), _local(other)
    return (
        other.shape == parameter.shape
        and part.shape == local.shape
        and part.dtype == local.dtype
        and part.device == local.device
        and part.layout == local.layout
    )


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r} of type {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


def _shares_elements(tensor: Tensor) -> bool:
    """Whether two indices of a tensor may be one place in memory."""
    if tensor.is_contiguous():
        return False
    reach = 0  # how far the axes with smaller strides go
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _has_memory(tensor: Tensor) -> bool:
    """Whether the storage of a tensor is as large as its shape says."""
    if not tensor.numel():
        return True
    last = tensor.storage_offset() + sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return bool(tensor.untyped_storage().nbytes() >= (last + 1) * tensor.element_size())
