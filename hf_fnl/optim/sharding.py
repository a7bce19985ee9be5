"""Which part of each parameter this process holds, and what processes tell each other.

Optimizers, decay and checkpoints ask here, so that they know nothing of engines.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hf_fnl.optim.layouts import Fragment, Group, Origin, Plain, check_whole, layout_of, names_of

__all__ = ["Collectives", "Fragment", "Shards", "shards_of"]


class Collectives:
    """What the processes among which parameters are divided tell each other.

    Args:
        group: The processes.
        device: Device on which they talk.

    Attributes:
        sent: Bytes that this process handed over so far, by purpose.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self.sent: Counter[str] = Counter()

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return dist.get_rank(self._group)

    def sum_(self, message: Tensor, purpose: str) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if message.numel():
            self.sent[purpose] += message.numel() * message.element_size()
            there = message.to(self._device)
            dist.all_reduce(there, group=self._group)
            if there is not message:
                message.copy_(there)
        return message

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self._group)

    def exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[int], purpose: str) -> Sequence[Tensor]:
        """Send a flat tensor to each process, and receive one of a length that is known from each."""
        message = torch.cat(list(outgoing)).to(self._device)
        self.sent[purpose] += message.numel() * message.element_size()
        received = message.new_empty(sum(incoming))
        lengths = [tensor.numel() for tensor in outgoing]
        dist.all_to_all_single(received, message, list(incoming), lengths, group=self._group)
        return received.to(outgoing[0].device).split(list(incoming))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values


class Shards:
    """Where the parameters of an optimizer are, whatever engine took them over; see :func:`shards_of`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._origins: dict[tuple[str, ...], list[Origin]] = {}  # by the names of a group
        self._groups: list[Group] = []
        self._layout: Plain | None = None
        self._collectives: Collectives | None = None
        self.remember()

    def remember(self) -> None:
        """Remember the parameters of groups that have just been added, as the model knows them."""
        for group in self._optimizer().param_groups:  # type: ignore[union-attr]
            if not any(group is known for known in self._groups):
                self._groups.append(group)
                pairs = zip(names_of(group), group["params"], strict=True)
                key = tuple(names_of(group)) if "param_names" in group else ()
                self._origins.setdefault(key, []).extend(Origin.of(name, parameter) for name, parameter in pairs)

    @property
    def layout(self) -> str:
        """``plain`` (one process, DDP, ZeRO-0), ``dtensor`` (FSDP2, HSDP), ``zero12`` or ``zero3``."""
        return self._locate().name

    @property
    def steps_in_parts(self) -> bool:
        """Whether the engine may call ``step`` several times, each time with a part of the parameters."""
        return self._locate().steps_in_parts

    @property
    def collectives(self) -> Collectives | None:
        """How the processes talk that divide the parameters; ``None`` where each of them holds all."""
        self._locate()
        return self._collectives

    def fragments(self) -> dict[str, Fragment]:
        """What this process holds of every parameter, by name.

        Raises:
            ValueError: If the parameters are divided in a way that is not supported.
            RuntimeError: If the weights of an engine are not where they are looked for.
        """
        layout = self._locate()
        return {fragment.name: fragment for group in self._groups for fragment in self._held(layout, group)}

    def due(self) -> list[tuple[Group, list[Fragment]]]:
        """What the optimizer's groups hold now, with each group: all of it, or the part that ZeRO lets it step."""
        layout = self._locate()
        held = []
        for group in self._optimizer().param_groups:  # type: ignore[union-attr]
            owners = {id(owner) for owner in group["params"]}
            fragments = self._held(layout, group) if owners else []
            held.append((group, [fragment for fragment in fragments if id(fragment.owner) in owners]))
        return held

    def _held(self, layout: Plain, group: Group) -> list[Fragment]:
        if layout.steps_in_parts and "param_names" not in group:
            raise ValueError(
                "under ZeRO parameters are found by name and these have none: build the optimizer from "
                "parameter_groups(model, ...) or model.named_parameters()"
            )
        return layout.fragments(group, self._origins.get(tuple(names_of(group)), []))

    def _locate(self) -> Plain:
        """Look where the parameters are; what an engine did to them is checked once."""
        groups = self._optimizer().param_groups  # type: ignore[union-attr]
        # While ZeRO-1 and 2 step they show the optimizer one group only.
        if len(groups) >= len(self._groups):
            self._groups = list(groups)
        layout = layout_of(self._groups, itertools.chain.from_iterable(self._origins.values()))
        if self._layout is None or layout.name != self._layout.name:
            self._collectives = self._connect(layout)
            self._layout = layout
        return self._layout

    def _connect(self, layout: Plain) -> Collectives | None:
        origins = {origin.name: origin for group in self._origins.values() for origin in group}
        if layout.name == "plain":
            check_whole(self._groups, list(origins.values()))
            return None
        fragments = [fragment for group in self._groups for fragment in self._held(layout, group)]
        divided = [fragment for fragment in fragments if fragment.group is not None]
        if not divided:
            return None
        if len({fragment.group for fragment in divided}) > 1:
            raise ValueError("parameters are divided among several groups of processes; one group is supported")
        _check_weights(layout, divided, origins)
        first = divided[0]
        assert first.group is not None
        return Collectives(first.group, layout.device(first, origins[first.name]))


_SHARDS: weakref.WeakKeyDictionary[Optimizer, Shards] = weakref.WeakKeyDictionary()


def shards_of(optimizer: Optimizer) -> Shards:
    """The shards of an optimizer.

    First called when the optimizer has just been built, over parameters as the model knows them; engines replace them
    later. :class:`~hf_fnl.optim.Lamb` and :class:`~hf_fnl.optim.frobenius_decay.FrobeniusDecay` see to that themselves.
    """
    if optimizer not in _SHARDS:
        _SHARDS[optimizer] = Shards(optimizer)
    return _SHARDS[optimizer]


def _check_weights(layout: Plain, fragments: Sequence[Fragment], origins: dict[str, Origin]) -> None:
    """Raise unless what is optimized is what the model holds: a guard against changes inside of engines."""
    for fragment in fragments:
        weight = layout.model_weight(fragment, origins[fragment.name])
        if weight is not None and not torch.equal(fragment.local.to(weight.device, weight.dtype), weight):
            raise RuntimeError(
                f"the weights that are optimized for {fragment.name} are not those of the model: this version of "
                f"DeepSpeed lays them out otherwise than {layout.name} is expected to"
            )
