"""The initial weights of a model, a few parameters at a time, as they are if the whole model is made at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fnl.layers import Factorized
from hf_fnl.math.spectral import DRAWN_METHODS
from hf_fnl.models.attention import FactorizedAttention
from hf_fnl.models.division import holders
from hf_fnl.models.recording import Event, MetaWrites, drawing_on_meta, record


@dataclass(frozen=True)
class Group:
    """Parameters that are set together.

    Args:
        names: Their names in the model.
        events: What sets them, in this order.
        initial: Their values before, where they have any.
    """

    names: list[str]
    events: list[Event]
    initial: dict[str, Tensor]


class Draws:
    """What a model draws when it is made, to be had for any of its parameters alone and in any order.

    The model is made on the meta device: nothing is decomposed and no parameter has values, but every random number is
    drawn and dropped. The random stream is afterwards where it would be if the model had been made as usual, and with
    the state in which it was before each module, that module is drawn again.

    Args:
        make: Makes the model.

    Attributes:
        model: The model, on the meta device; buffers have their values.
        groups: All parameters.

    Raises:
        ValueError: If a parameter gets no value.
    """

    def __init__(self, make: Callable[[], PreTrainedModel]) -> None:
        self.model, events, initial = record(make)
        self._holders = holders(self.model)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        self.groups = _grouped(names, events, initial)
        if missing := set(names.values()) - {name for group in self.groups for name in group.names}:
            raise ValueError(f"nothing in {type(self.model).__name__} sets {min(missing)} when it is made")

    @torch.no_grad()
    def draw(self, group: Group) -> dict[str, Tensor]:
        """The values of a group by name, on the CPU; the random stream stays where it is."""
        owners = {name: self.model.get_parameter(name) for name in group.names}
        values = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in owners.items()}
        for name, value in group.initial.items():
            values[name].copy_(value)
        for name, parameter in owners.items():
            self._hold(parameter, nn.Parameter(values[name], requires_grad=False))
        try:
            # What is not of the group stays on the meta device, and its draws are dropped again.
            with torch.random.fork_rng(devices=()), drawing_on_meta(), MetaWrites():
                for event in group.events:
                    torch.set_rng_state(event.state)
                    event.owner._init_weights(event.module)
        finally:
            for parameter in owners.values():
                self._hold(parameter, parameter)
        return values

    def _hold(self, parameter: nn.Parameter, value: nn.Parameter) -> None:
        for module, attribute in self._holders[parameter]:
            module._parameters[attribute] = value

    def cost(self, group: Group) -> float:
        """Time to decompose what is drawn, as :func:`matrix_cost`; 0 if nothing is."""
        holding = (self.model.get_submodule(name.rpartition(".")[0]) for name in group.names)
        modules = dict.fromkeys([*(event.module for event in group.events), *holding])
        return sum(_decomposition_cost(module) for module in modules)


def _grouped(names: dict[nn.Parameter, str], events: list[Event], initial: dict[nn.Parameter, Tensor]) -> list[Group]:
    """Parameters that one call or several set together."""
    groups = {names[p]: Group([names[p]], [], {names[p]: value}) for p, value in initial.items() if p in names}
    for event in events:
        written = [names[parameter] for parameter in event.written if parameter in names]
        parts = list({id(groups[name]): groups[name] for name in written if name in groups}.values())
        known = [name for part in parts for name in part.names]
        group = Group(
            sorted({*known, *written}),
            sorted([event, *(e for part in parts for e in part.events)], key=lambda e: e.number),
            {name: value for part in parts for name, value in part.initial.items()},
        )
        groups |= dict.fromkeys(group.names, group)
    unique = {id(group): group for group in groups.values()}.values()
    # In one order in every process: they exchange what they have drawn.
    return sorted(unique, key=lambda group: group.names)


def matrix_cost(m: int, n: int) -> float:
    """Time of a truncated SVD, up to a factor: the Gram matrix, and its eigenvectors at 50 times as much an entry.

    The factor was measured on the matrices of BERT-base, of 768 by 3,072 and of 30,522 by 768.
    """
    short, long = sorted((m, n))
    return short**2 * (long + 50.0 * short)


def _decomposition_cost(module: nn.Module) -> float:
    if isinstance(module, FactorizedAttention):
        hidden, ranks = module.projections(module)[0].weight.shape[1], module.ranks
        cut = [
            kind
            for kind, rank in (("qk", ranks.qk), ("ov", ranks.ov))
            if rank and ranks.init[kind] not in DRAWN_METHODS
        ]
        # Two Gram matrices of each head, in float64; the factor was measured as that of `matrix_cost`.
        return 100.0 * len(cut) * hidden**2 * (hidden // module.num_heads)
    if isinstance(module, Factorized) and module.init not in DRAWN_METHODS:
        m, *others = module.shape
        return matrix_cost(m, math.prod(others))
    return 0.0
