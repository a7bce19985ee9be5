"""Which part of each parameter this process holds, where an engine shards them, and what the processes tell each other.

Under FSDP2, HSDP and DeepSpeed's ZeRO a process holds one contiguous range of each row-major flattened parameter.
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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from hf_fnl.layers.partitioned import full_shape
from hf_fnl.optim import zero

Group: TypeAlias = dict[str, Any]


@dataclass(eq=False, slots=True)
class Shard:
    """The range of a row-major flattened parameter that this process holds.

    Args:
        name: Name of the parameter.
        shape: Shape of the full parameter.
        bounds: Where the range of each process begins, in the order of their ranks, and the end of the last.
        rank: Number of this process among them.
        owner: The tensor in ``optimizer.param_groups`` that holds the range, and the key of its state.
        offset: Where the range begins in the flattened ``owner``; ``None`` if ``owner`` holds nothing else.
        group: The processes that share the parameter; ``None`` where each holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    bounds: Sequence[int]
    rank: int
    owner: Tensor
    offset: int | None = None
    group: dist.ProcessGroup | None = None

    @property
    def range(self) -> tuple[int, int]:
        """First element that is held here, and end of the range; the same where nothing is held."""
        return self.bounds[self.rank], self.bounds[self.rank + 1]

    @property
    def start(self) -> int:
        """First element that is held here."""
        return self.range[0]

    @property
    def stop(self) -> int:
        """End of the range."""
        return self.range[1]

    def of(self, tensor: Tensor) -> Tensor:
        """Return the range of ``owner``, its gradient or a state of it: a view."""
        local = to_local(tensor)
        return local if self.offset is None else local.view(-1).narrow(0, self.offset, self.stop - self.start)


class Processes:
    """The processes that share parameters.

    Args:
        group: The processes; ``None`` for this one alone.
        device: Device on which they talk.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)

    def sum_(self, message: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self._group is None:
            return message
        there = message.to(self._device)
        dist.all_reduce(there, group=self._group)
        return message if there is message else message.copy_(there)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int]) -> Sequence[Tensor]:
        """Send a flat tensor to each process, and receive one of a length that is known from each."""
        message = torch.cat(list(outgoing)).to(self._device)
        received = message.new_empty(sum(incoming))
        lengths = [tensor.numel() for tensor in outgoing]
        dist.all_to_all_single(received, message, list(incoming), lengths, group=self._group)
        return received.to(outgoing[0].device).split(list(incoming))


class Shards(NamedTuple):
    """The shards of all parameters by name, and of those that this step moves, with their groups."""

    by_name: dict[str, Shard]
    due: list[tuple[Group, list[Shard]]]
    processes: Processes
    steps_in_parts: bool  # whether the engine calls ``step`` several times, each time with a part of the parameters


class Origin(NamedTuple):
    """A parameter as the model knew it when the optimizer was built; weak, for engines free it."""

    name: str
    shape: tuple[int, ...]
    reference: weakref.ref[Tensor]


class Sharding:
    """Finds the shards of the parameters of an optimizer, whatever engine took them over since it was built."""

    def __init__(self, groups: Sequence[Group] = ()) -> None:
        self._groups: list[Group] = []
        self._origins: dict[tuple[str, ...], list[Origin]] = {}  # by the names of a group
        self._processes: Processes | None = None
        self._checked = False
        self.remember(groups)

    def remember(self, groups: Sequence[Group]) -> None:
        """Remember the parameters of groups that were added, as the model knows them."""
        for number, group in enumerate(groups):
            if not any(group is known for known in self._groups):
                self._groups.append(group)
                pairs = zip(names_of(group, number), group["params"], strict=True)
                made = [Origin(name, tuple(full_shape(p)), weakref.ref(p)) for name, p in pairs]
                self._origins.setdefault(_key(group), []).extend(made)

    def find(self, groups: Sequence[Group]) -> Shards | None:
        """Return the shards, or ``None`` where every process holds full parameters: one process, DDP, ZeRO-0.

        Args:
            groups: What the optimizer has now: all its groups, or those that ZeRO lets it step.

        Raises:
            ValueError: If the parameters are sharded, or flattened, in a way that is not supported.
            RuntimeError: If the weights of an engine are not where they are looked for.
        """
        if len(groups) >= len(self._groups):
            self._groups = list(groups)
        else:  # ZeRO-1 and 2 show one group at a time, which is another dict after a state was loaded
            shown = {_key(group): group for group in groups}
            self._groups = [shown.get(_key(group), group) for group in self._groups]
        stage = self._stage() if dist.is_initialized() else 0
        if not stage and not any(
            issubclass(kind, DTensor) for group in self._groups for kind in set(map(type, group["params"]))
        ):
            if not self._checked:
                self._check_not_flat()
            self._checked = True
            return None
        held = [(group, self._shards(number, group, stage)) for number, group in enumerate(self._groups)]
        if self._processes is None:
            self._processes = self._connect([shard for _, shards in held for shard in shards], stage)
        owners = {id(owner) for group in groups for owner in group["params"]}
        due = [(group, [shard for shard in shards if id(shard.owner) in owners]) for group, shards in held]
        by_name = {shard.name: shard for _, shards in held for shard in shards}
        return Shards(by_name, due, self._processes, steps_in_parts=stage > 0)

    def _stage(self) -> int:
        parameters = (origin.reference() for origins in self._origins.values() for origin in origins)
        return next((zero.stage_of(p) for p in parameters if p is not None), 0)  # an engine marks all of them

    def _shards(self, number: int, group: Group, stage: int) -> list[Shard]:
        if not stage:
            return [_of_dtensor(name, p) for name, p in zip(names_of(group, number), group["params"], strict=True)]
        if "param_names" not in group:
            raise ValueError(
                "under ZeRO parameters are found by name and these have none: build the optimizer from "
                "parameter_groups(model, ...) or model.named_parameters()"
            )
        find = zero.find_zero3 if stage == 3 else zero.find_zero12
        shards = []
        for name, shape, reference in self._origins.get(_key(group), ()):
            place = find(reference(), math.prod(shape), group)
            shards.append(Shard(name, shape, place.bounds, dist.get_rank(place.group), *place[1:]))
        return shards

    def _connect(self, shards: Sequence[Shard], stage: int) -> Processes:
        """Check, once, what an engine did to the parameters; returns the processes that share them."""
        sharded = [shard for shard in shards if shard.group is not None]
        if not sharded:
            return Processes(None, shards[0].owner.device)
        if len({shard.group for shard in sharded}) > 1:
            raise ValueError("parameters are sharded over several groups of processes; one group is supported")
        if stage:
            parameters: dict[str, Any] = {o.name: o.reference() for each in self._origins.values() for o in each}
            for shard in sharded:
                zero.check_weight(shard.name, shard.of(shard.owner.detach()), parameters[shard.name], shard.start)
            device = next(iter(parameters.values())).device  # the weights that are optimized may be offloaded
        else:
            device = torch.device(sharded[0].owner.device_mesh.device_type)  # type: ignore[attr-defined]
        return Processes(sharded[0].group, device)

    def _check_not_flat(self) -> None:
        """Raise a ``ValueError`` if an engine flattened parameters: FSDP 1, or DeepSpeed in bf16 without ZeRO."""
        shapes = {origin.name: origin.shape for origins in self._origins.values() for origin in origins}
        for number, group in enumerate(self._groups):
            if len(names_of(group, number)) != len(group["params"]):
                raise ValueError(
                    "DeepSpeed replaced the parameters by one flat tensor: without ZeRO it steps once with zero "
                    "gradients already when it starts, which moves the weights; in fp16 or bf16 take ZeRO stage 1, or "
                    "DDP"
                )
            for name, parameter in zip(names_of(group, number), group["params"], strict=True):
                if parameter.ndim == 1 and len(shape := shapes.get(name, ())) > 1:
                    raise ValueError(
                        f"{name} is flat and {parameter.numel()} long where the model has {tuple(shape)}: FSDP version "
                        "1 does not keep the matrices that LAMB and Frobenius decay need; set fsdp_version to 2"
                    )


def names_of(group: Group, number: int) -> list[str]:
    """Return the names of the parameters of a group; where they have none, what errors call them."""
    if "param_names" in group:
        names: list[str] = group["param_names"]
        return names
    return [f"parameter {i} of group {number}" for i in range(len(group["params"]))]


def to_local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _key(group: Group) -> tuple[str, ...]:
    return tuple(group.get("param_names", ()))


def _of_dtensor(name: str, parameter: Tensor) -> Shard:
    shape = tuple(parameter.shape)
    placements: Iterable[Any] = parameter.placements if isinstance(parameter, DTensor) else ()
    sharded = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if not isinstance(parameter, DTensor) or not sharded:
        return Shard(name, shape, (0, parameter.numel()), 0, parameter)
    placement = parameter.placements[sharded[0]]
    if len(sharded) > 1 or type(placement) is not ShardPlacement or placement.dim != 0:
        raise ValueError(
            f"{name} is distributed as {parameter.placements}: supported are parameters that are sharded along their "
            "first dimension over one dimension of the mesh, as by FSDP2 and HSDP; leave tensor parallelism off"
        )
    mesh, dim = parameter.device_mesh, sharded[0]
    rows = -(-shape[0] // mesh.size(dim))  # as torch.chunk divides them
    bounds = [min(rank * rows, shape[0]) * math.prod(shape[1:]) for rank in range(mesh.size(dim) + 1)]
    return Shard(name, shape, bounds, mesh.get_local_rank(dim), parameter, None, mesh.get_group(dim))
