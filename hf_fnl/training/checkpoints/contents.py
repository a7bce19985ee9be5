"""What of a training this process holds: the model's weights, and for each what the optimizer knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_fnl.layers.whole import is_partitioned
from hf_fnl.optim.layouts import Distributed, Fragment, zero3_range
from hf_fnl.optim.sharding import shards_of

WEIGHT, MASTER = "weight", "master"
# What optimizers count is a number for a parameter, whatever its shape.
_COUNTS = ("step",)


class UnsupportedStateError(ValueError):
    """The state of an optimizer is not one value per element of each parameter."""


@dataclass
class Held:
    """The range ``[start, stop)`` of a flattened tensor that this process holds, under several heads.

    Args:
        name: Name of the tensor in the model.
        shape: Shape of the whole.
        start: First element that is here.
        stop: End of the range.
        group: The processes that divide the tensor; ``None`` if each holds it whole.
        tensors: What is held of the range: the ``weight``, the ``master`` weight and states of the optimizer.
        numbers: States that are one number for the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    group: dist.ProcessGroup | None
    tensors: dict[str, Tensor]
    numbers: dict[str, Any] = field(default_factory=dict)


def held_weights(model: nn.Module) -> Iterator[Held]:
    """What this process holds of each weight and persistent buffer of a model, those that are tied once."""
    for name, tensor in _named_tensors(model):
        if is_partitioned(tensor):
            yield _held_by_zero3(name, tensor)
        elif isinstance(tensor, DTensor):
            (fragment,) = Distributed.fragments({"params": [tensor], "param_names": [name]}, ())
            span = (fragment.shape, fragment.start, fragment.stop)
            yield Held(name, *span, fragment.group, {WEIGHT: fragment.local})
        else:
            yield Held(name, tuple(tensor.shape), 0, tensor.numel(), None, {WEIGHT: tensor.detach()})


def whole_copies(model: nn.Module) -> Iterator[Held]:
    """The small parameters that ZeRO-3 keeps whole, besides the part of each that is in :func:`held_weights`."""
    parameter: Any
    for name, parameter in model.named_parameters():
        if is_partitioned(parameter) and parameter.numel() == parameter.ds_numel:
            span = (tuple(parameter.ds_shape), 0, parameter.ds_numel)
            yield Held(name, *span, None, {WEIGHT: parameter.detach()})


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter by its first one; tied parameters have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: [first, *others] for first, *others in names.values()}


def held_states(optimizer: Optimizer, dtypes: dict[str, torch.dtype]) -> list[Held]:
    """What this process holds of the state of an optimizer, and of the weights that it optimizes in a wider dtype.

    Args:
        optimizer: Without its wrappers.
        dtypes: In which the model holds its weights, by name.

    Raises:
        UnsupportedStateError: If a state is something else than one value per element, or a number.
    """
    held = []
    for fragment in shards_of(optimizer).fragments().values():
        tensors, numbers = _states(fragment, optimizer)
        if fragment.local.dtype != dtypes.get(fragment.name, fragment.local.dtype):
            tensors[MASTER] = fragment.local
        span = (fragment.shape, fragment.start, fragment.stop)
        held.append(Held(fragment.name, *span, fragment.group, tensors, numbers))
    return held


def _states(fragment: Fragment, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, numbers = {}, {}
    for key, value in optimizer.state.get(fragment.owner, {}).items():
        if isinstance(value, Tensor) and value.shape == fragment.owner.shape and key not in _COUNTS:
            tensors[key] = fragment.part(value)
        elif isinstance(value, Tensor) and value.numel() == 1:
            numbers[key] = [str(value.dtype).removeprefix("torch."), value.item()]
        elif isinstance(value, int | float):
            numbers[key] = ["number", value]
        elif value is not None:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedStateError(
                f"{type(optimizer).__name__} keeps {key} ({given}) for {fragment.name} of shape {fragment.shape}, and "
                "a checkpoint for every engine holds one value per element only: choose another optim"
            )
    return tensors, numbers


def number(tag: str, value: Any) -> Any:
    """A number of a state as it was, from how it was saved."""
    return value if tag == "number" else torch.tensor(value, dtype=getattr(torch, tag))


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def _held_by_zero3(name: str, parameter: Any) -> Held:
    start, stop = zero3_range(parameter)
    part = parameter.ds_tensor.detach().view(-1)[: stop - start]
    return Held(name, tuple(parameter.ds_shape), start, stop, parameter.ds_process_group, {WEIGHT: part})


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """In which dtype a model holds each of its parameters."""
    return {name: parameter.dtype for name, parameter in model.named_parameters()}
