"""The ways in which engines lay out parameters over processes, one adapter each.

In all of them a process holds one contiguous range of each row-major flattened parameter.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from hf_fnl.layers.whole import whole_shape

Group: TypeAlias = dict[str, Any]


@dataclass(eq=False, slots=True)
class Fragment:
    """The range ``[start, stop)`` of a row-major flattened parameter that this process holds.

    Args:
        name: Name of the parameter.
        shape: Shape of the whole parameter.
        start: First element that is held here.
        stop: End of the range; equal to ``start`` where nothing is held.
        local: What the optimizer updates here: the parameter itself, the local tensor of a ``DTensor``, or a flat piece
            of ZeRO's float32 weights.
        owner: The tensor in ``optimizer.param_groups`` that holds it, and the key of its state.
        offset: Where ``local`` begins in the flattened elements of ``owner``; ``None`` if ``owner`` holds nothing else.
        group: The processes among which the parameter is divided; ``None`` where all of it is here.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    local: Tensor
    owner: Tensor
    offset: int | None
    group: dist.ProcessGroup | None

    @property
    def data(self) -> Tensor:
        """``local``, flat; a copy where it does not lie in a row."""
        return self.local.reshape(-1)

    def part(self, tensor: Tensor) -> Tensor:
        """The same range of a gradient or a state, which are laid out as ``owner``, in the shape of ``local``."""
        local = _local(tensor)
        return local if self.offset is None else local.view(-1).narrow(0, self.offset, self.stop - self.start)


class Origin(NamedTuple):
    """A parameter as the model knew it when the optimizer was built; weak, for sharding must free what was whole."""

    name: str
    shape: tuple[int, ...]
    reference: weakref.ref[Tensor]

    @classmethod
    def of(cls, name: str, parameter: Tensor) -> Origin:
        """Remember a parameter; one that ``zero.Init`` emptied says its shape itself."""
        return cls(name, tuple(whole_shape(parameter)), weakref.ref(parameter))

    def has(self, *attributes: str) -> bool:
        """Whether the parameter is still there and an engine marked it so."""
        parameter = self.reference()
        return parameter is not None and all(hasattr(parameter, attribute) for attribute in attributes)


class Plain:
    """Every process holds whole parameters: one process, DDP, DeepSpeed without ZeRO."""

    name = "plain"
    steps_in_parts = False

    @staticmethod
    def fragments(group: Group, origins: Sequence[Origin]) -> list[Fragment]:
        """What the group holds."""
        return [
            Fragment(name, tuple(p.shape), 0, p.numel(), p.detach(), p, None, None)
            for name, p in zip(names_of(group), group["params"], strict=True)
        ]

    @staticmethod
    def device(fragment: Fragment, origin: Origin) -> torch.device:
        """Where the processes talk."""
        return fragment.local.device

    @staticmethod
    def model_weight(fragment: Fragment, origin: Origin) -> Tensor | None:
        """What the model holds of the range, if that is something else than ``fragment.local``."""
        return None


class Distributed(Plain):
    """Parameters are ``DTensor``s sharded along their first dimension: FSDP2 and HSDP."""

    name = "dtensor"

    @staticmethod
    def fragments(group: Group, origins: Sequence[Origin]) -> list[Fragment]:
        """What the group holds."""
        return [_distributed(name, p) for name, p in zip(names_of(group), group["params"], strict=True)]

    @staticmethod
    def device(fragment: Fragment, origin: Origin) -> torch.device:
        """That of the mesh; parameters that are offloaded lie elsewhere."""
        owner: Any = fragment.owner
        return torch.device(owner.device_mesh.device_type)


class Zero12(Plain):
    """DeepSpeed's ZeRO-1 and 2: the weights of a group are one flat buffer, of which each process owns a part."""

    name = "zero12"
    steps_in_parts = True

    @staticmethod
    def fragments(group: Group, origins: Sequence[Origin]) -> list[Fragment]:
        """What the group holds: the model's weights are views of the buffer, so their offset says where they lie."""
        (owner,) = group["params"]
        length = owner.numel()
        fragments = []
        for name, shape, reference in origins:
            parameter: Any = reference()
            begin, first = parameter.data.storage_offset(), dist.get_rank(parameter._dp_group) * length
            start = max(begin, first)
            stop = max(start, min(begin + math.prod(shape), first + length))
            offset = min(start - first, length) if stop > start else 0
            local = owner.detach().narrow(0, offset, stop - start)
            start, stop = (start - begin, stop - begin) if stop > start else (0, 0)
            fragments.append(Fragment(name, shape, start, stop, local, owner, offset, parameter._dp_group))
        return fragments

    @staticmethod
    def device(fragment: Fragment, origin: Origin) -> torch.device:
        """That of the model; the weights that are optimized may be offloaded."""
        return origin.reference().device  # type: ignore[union-attr]

    @staticmethod
    def model_weight(fragment: Fragment, origin: Origin) -> Tensor | None:
        """What the model holds of the range."""
        return origin.reference().detach().reshape(-1)[fragment.start : fragment.stop]  # type: ignore[union-attr]


class Zero3(Zero12):
    """DeepSpeed's ZeRO-3: each process owns a part of each parameter, in flat buffers of some parameters each."""

    name = "zero3"

    @staticmethod
    def fragments(group: Group, origins: Sequence[Origin]) -> list[Fragment]:
        """What the group holds."""
        fragments = []
        for name, shape, reference in origins:
            parameter: Any = reference()
            engine = parameter._z3_optimizer
            number, offset, _ = engine.grad_position[engine.get_param_id(parameter)]
            owner = engine.fp32_partitioned_groups_flat[number]
            if owner.numel() == 0:
                raise ValueError(
                    "weights that DeepSpeed offloads to NVMe cannot be optimized here: set the device of "
                    "offload_optimizer and offload_param to cpu or none"
                )
            start, stop = zero3_range(parameter)
            local = owner.detach().narrow(0, offset, stop - start)
            fragments.append(Fragment(name, shape, start, stop, local, owner, offset, parameter.ds_process_group))
        return fragments

    @staticmethod
    def model_weight(fragment: Fragment, origin: Origin) -> Tensor | None:
        """What the model holds of the range."""
        parameter: Any = origin.reference()
        return parameter.ds_tensor.detach().view(-1)[: fragment.stop - fragment.start]


def layout_of(groups: Sequence[Group], origins: Iterable[Origin]) -> Plain:
    """The layout in which parameters are now."""
    marked = next((origin for origin in origins if origin.has()), None)  # an engine marks all of them
    if marked is not None and marked.has("ds_id", "_z3_optimizer"):
        return Zero3()
    if marked is not None and marked.has("_hp_mapping"):
        return Zero12()
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        return Distributed()
    return Plain()


def zero3_range(parameter: Any) -> tuple[int, int]:
    """First element and end of what this process holds of a flattened parameter that ZeRO-3 divides."""
    length = parameter.ds_tensor.ds_numel
    start = min(dist.get_rank(parameter.ds_process_group) * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


def names_of(group: Group) -> list[str]:
    """Names of the parameters of a group; numbers where they have none."""
    return group["param_names"] if "param_names" in group else [str(i) for i in range(len(group["params"]))]


def check_whole(groups: Sequence[Group], origins: Sequence[Origin]) -> None:
    """Raise a ``ValueError`` unless groups hold parameters as the model has them, not flattened.

    FSDP version 1 flattens parameters, and DeepSpeed does in half precision without ZeRO.
    """
    shapes = {origin.name: origin.shape for origin in origins}
    for group in groups:
        if len(names_of(group)) != len(group["params"]):
            raise ValueError(
                "DeepSpeed replaced the parameters by one flat tensor: without ZeRO it steps once with zero gradients "
                "already when it starts, which moves the weights; in fp16 or bf16 take ZeRO stage 1, or DDP"
            )
        for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False):
            shape = shapes.get(name, parameter.shape)
            if parameter.ndim == 1 and len(shape) > 1:
                raise ValueError(
                    f"{name} is flat and {parameter.numel()} long where the model has {tuple(shape)}: FSDP version 1 "
                    "does not keep the matrices that LAMB and Frobenius decay need; set fsdp_version to 2"
                )


def _distributed(name: str, parameter: Tensor) -> Fragment:
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return Fragment(name, shape, 0, parameter.numel(), parameter.detach(), parameter, None, None)
    local = _local(parameter.detach())
    sharded = [dim for dim, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if not sharded:
        return Fragment(name, shape, 0, parameter.numel(), local, parameter, None, None)
    placements = [parameter.placements[dim] for dim in sharded]
    if len(placements) > 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            f"{name} is distributed as {parameter.placements}: supported are parameters that are sharded along their "
            "first dimension over one dimension of the mesh, as by FSDP2 and HSDP; leave tensor parallelism off"
        )
    mesh, dim = parameter.device_mesh, sharded[0]
    rows = -(-shape[0] // mesh.size(dim))  # as torch.chunk divides them
    start = min(mesh.get_local_rank(dim) * rows, shape[0]) * math.prod(shape[1:])
    return Fragment(name, shape, start, start + local.numel(), local, parameter, None, mesh.get_group(dim))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
