"""Finds the float32 weights of a parameter under DeepSpeed's ZeRO: the only file that reads its private fields.

Seen in deepspeed 0.19; ``tests/support/workers/sharded_engines.py`` checks what each field means.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Place(NamedTuple):
    """Place of a parameter: the bounds of the ranges of all processes, and where the local one is optimized."""

    bounds: list[int]
    owner: Tensor
    offset: int
    group: dist.ProcessGroup


def stage_of(parameter: Any) -> int:
    """Return 3 under ZeRO-3, 1 under ZeRO-1 and 2, else 0."""
    if hasattr(parameter, "ds_id") and hasattr(parameter, "_z3_optimizer"):
        return 3
    return 1 if hasattr(parameter, "_hp_mapping") else 0


def find_zero12(parameter: Any, numel: int, group: dict[str, Any]) -> Place:
    """Return the place of a parameter under ZeRO-1 and 2.

    The model's weights of a group are views of one flat buffer, of which each process optimizes an equal part.
    """
    (owner,) = group["params"]
    processes, length = parameter._dp_group, owner.numel()
    begin = parameter.data.storage_offset()
    bounds = [min(max(rank * length - begin, 0), numel) for rank in range(dist.get_world_size(processes) + 1)]
    offset = min(max(begin - dist.get_rank(processes) * length, 0), length)
    return Place(bounds, owner, offset, processes)


def find_zero3(parameter: Any, numel: int, group: dict[str, Any]) -> Place:
    """Return the place of a parameter under ZeRO-3.

    Each process has an equal part of each parameter, in flat buffers of some parameters each.
    """
    engine = parameter._z3_optimizer
    number, offset, _ = engine.grad_position[engine.get_param_id(parameter)]
    owner = engine.fp32_partitioned_groups_flat[number]
    if owner.numel() == 0:
        raise ValueError(
            "weights that DeepSpeed offloads to NVMe cannot be optimized here: set the device of "
            "offload_optimizer and offload_param to cpu or none"
        )
    return Place(zero3_bounds(parameter), owner, offset, parameter.ds_process_group)


def zero3_bounds(parameter: Any) -> list[int]:
    """Return where the range of each process in a flattened parameter of ZeRO-3 begins, and the end of the last."""
    size, length = dist.get_world_size(parameter.ds_process_group), parameter.ds_tensor.ds_numel
    return [min(rank * length, parameter.ds_numel) for rank in range(size + 1)]


def zero3_range(parameter: Any) -> tuple[int, int]:
    """Return the first element and the end of what this process holds of a flattened parameter of ZeRO-3."""
    bounds, rank = zero3_bounds(parameter), dist.get_rank(parameter.ds_process_group)
    return bounds[rank], bounds[rank + 1]


def check_weight(name: str, optimized: Tensor, parameter: Any, start: int) -> None:
    """Raise a ``RuntimeError`` unless what is optimized is what the model holds: a guard against other releases."""
    is_zero3 = stage_of(parameter) == 3
    flat = parameter.ds_tensor.detach().view(-1) if is_zero3 else parameter.detach().reshape(-1)[start:]
    held = flat[: optimized.numel()]
    if not torch.equal(optimized.to(held.device, held.dtype), held):
        raise RuntimeError(
            f"the weights that are optimized for {name} are not those of the model: this version of DeepSpeed lays "
            f"them out otherwise than ZeRO-{'3' if is_zero3 else '1 and 2'} is expected to"
        )
