"""The heads of an attention as what can be cut: its projections side by side, their products, and narrower layers."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention.projections import AttentionProjections
from hf_fnl.layers import HeadProjection
from hf_fnl.layers.linear import Span
from hf_fnl.layers.weight import HoldsFactors
from hf_fnl.math.factors import kept_energy
from hf_fnl.math.spectral import DRAWN_METHODS
from hf_fnl.math.truncation import HeadMoments, HeadWeights, ov_energies, qk_energies, truncate_ov, truncate_qk
from hf_fnl.surgery.measure import HeadMomentsRequest
from hf_fnl.surgery.targets import Cut, Draw, LayerTarget, Replacements


class Side(enum.IntEnum):
    """The projections of an attention."""

    QUERY = 0
    KEY = 1
    VALUE = 2
    OUTPUT = 3


_SIDES: dict[str, tuple[int, int]] = {"qk": (Side.QUERY, Side.KEY), "ov": (Side.VALUE, Side.OUTPUT)}


@dataclass(frozen=True, eq=False)
class Attention:
    """The four projections of an attention, each a layer or a part of one.

    Args:
        name: Name of the module.
        spans: Query, key, value and output.
        num_heads: Heads of queries.
        num_kv_heads: Heads of keys and values.
    """

    name: str
    spans: tuple[Span, Span, Span, Span]
    num_heads: int
    num_kv_heads: int

    @classmethod
    def of(cls, name: str, module: nn.Module, projections: AttentionProjections, kind: str) -> Attention | None:
        """Return the attention of a module, ``None`` if a projection of a kind is not a layer's weight.

        Projections of the other kind may be anything.
        """
        layers = {layer.weight: layer for layer in module.modules() if isinstance(layer, nn.Linear | Conv1D)}
        spans: list[Any] = []
        sides: tuple[Any, ...] = (projections.query, projections.key, projections.value, projections.output)
        for side in sides:
            if isinstance(side, nn.Linear | Conv1D):
                spans.append(Span(side))
            else:
                layer = layers.get(getattr(side, "weight", None)) if not isinstance(side, HoldsFactors) else None
                spans.append(None if layer is None else Span(layer, side.start, side.length))
        if any(spans[side] is None for side in _SIDES[kind]):
            return None
        query, key, value, output = spans
        return cls(name, (query, key, value, output), projections.num_heads, projections.num_kv_heads)

    def count(self, side: int) -> int:
        """Return the heads of a projection."""
        return self.num_heads if side in (Side.QUERY, Side.OUTPUT) else self.num_kv_heads

    def rank(self, side: int) -> int:
        """Return the present width of the heads of a projection."""
        return self.spans[side].weight.shape[int(side == Side.OUTPUT)] // self.count(side)

    def projection(self, side: int) -> HeadWeights:
        """Return a projection head by head: ``(heads, d, r)``, and its bias."""
        span, count = self.spans[side], self.count(side)
        if side == Side.OUTPUT:
            return HeadWeights(span.weight.unflatten(1, (count, -1)).transpose(0, 1), span.bias)
        bias = None if span.bias is None else span.bias.unflatten(0, (count, -1))
        return HeadWeights(span.weight.unflatten(0, (count, -1)).mT, bias)

    def layers(self, kinds: Sequence[str]) -> dict[nn.Module, list[int]]:
        """Return the layers that hold the products of some kinds, each with all projections that lie in it."""
        touched = dict.fromkeys(self.spans[side].layer for kind in kinds for side in _SIDES[kind])
        return {layer: self._sides_in(layer) for layer in touched}

    def _sides_in(self, layer: nn.Module) -> list[int]:
        sides = (side for side, span in enumerate(self.spans) if span is not None and span.layer is layer)
        return sorted(sides, key=lambda side: self.spans[side].start)

    def after(self, cut: Mapping[nn.Module, Any]) -> Attention:
        """Return the attention with the layers that take the places of present ones."""
        spans: list[Any] = list(self.spans)
        for layer in {span.layer for span in self.spans if span is not None}:
            new, start = cut.get(layer), 0
            if not isinstance(new, HeadProjection):
                continue
            for side, (count, rank) in zip(self._sides_in(layer), new.heads, strict=True):
                spans[side] = Span(new) if side == Side.OUTPUT else Span(new, start, count * rank)
                start += count * rank
        query, key, value, output = spans
        return replace(self, spans=(query, key, value, output))


@dataclass(frozen=True)
class HeadTarget:
    """The ``qk`` or ``ov`` products of all heads of an attention.

    Args:
        attention: The attention.
        kind: ``"qk"`` or ``"ov"``.
        layer_names: Names of the layers that hold it.
    """

    attention: Attention
    kind: str
    layer_names: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the product."""
        return f"{self.attention.name}.{self.kind}" if self.attention.name else self.kind

    @property
    def module_name(self) -> str:
        """Name of the module that runs when data reach it."""
        return self.attention.name

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which patterns may mean it."""
        return (self.attention.name, self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of heads, and the shape of the product of one."""
        left, right = (self.attention.projection(side).weight for side in _SIDES[self.kind])
        return (self.attention.num_heads, left.shape[1], right.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights that have to be finite."""
        return tuple(self.attention.spans[side].weight for side in _SIDES[self.kind])

    @property
    def parameters(self) -> int:
        """Parameters that get fewer with the rank: of weights, and of the biases that are as wide as heads."""
        spans = [self.attention.spans[side] for side in _SIDES[self.kind]]
        biases = (span.bias for span in (spans if self.kind == "qk" else spans[:1]))
        return sum(s.weight.numel() for s in spans) + sum(bias.numel() for bias in biases if bias is not None)

    def sizes(self, **_: bool) -> tuple[int, Callable[[int], int], int]:
        """Return the width of a head, the parameters at a rank, and that width again."""
        width, dense = self.attention.rank(_SIDES[self.kind][0]), self.parameters
        return width, lambda rank: rank * dense // width, width

    @property
    def is_cut(self) -> bool:
        """Whether the heads are narrower than those of the dense layers already."""
        spans = (self.attention.spans[side] for side in _SIDES[self.kind])
        widths = {span.layer.dense_width for span in spans if isinstance(span.layer, HeadProjection)}
        return bool(widths) and self.sizes()[0] < min(widths)

    @property
    def request(self) -> HeadMomentsRequest:
        """The moments of what the product is of."""
        (query, key, _, output), counts = self.attention.spans, (self.attention.num_heads, self.attention.num_kv_heads)
        if self.kind == "qk":
            return HeadMomentsRequest(*counts, query=query, key=key)
        return HeadMomentsRequest(*counts, output=output.layer)

    def energies(self, moments: Any) -> Tensor:
        """Return the squared singular values, summed over the heads rank by rank, in the metric of data if any."""
        left, right = (self.attention.projection(side) for side in _SIDES[self.kind])
        return (qk_energies if self.kind == "qk" else ov_energies)(left, right, moments)

    def parameters_after(self, layers: Mapping[nn.Module, Any]) -> int:
        """Return what :attr:`parameters` are after the cut."""
        return replace(self, attention=self.attention.after(layers)).parameters

    def kept_energy(self, layers: Mapping[nn.Module, Any]) -> float:
        """Return the share of the squared norm of all heads' products that the layers of a cut keep."""
        before, after = (self._factors(attention) for attention in (self.attention, self.attention.after(layers)))
        return kept_energy(before, *after)

    def _factors(self, attention: Attention) -> tuple[Tensor, ...]:
        group = (attention.num_kv_heads, -1)
        return tuple(attention.projection(side).weight.unflatten(0, group) for side in _SIDES[self.kind])


Target: TypeAlias = LayerTarget | HeadTarget


def cut_heads(cuts: Sequence[Cut], moments: HeadMoments | None, draw: Callable[[nn.Module], Draw]) -> Replacements:
    """Return the layers of an attention with narrower heads, by the present ones, which stay as they are.

    Args:
        cuts: The products of one attention that are cut.
        moments: Of what flows through the heads, if there are data.
        draw: Gives for a layer what fills a weight as the model does.
    """
    attention = cuts[0].target.attention  # type: ignore[union-attr]
    by_kind = {cut.target.kind: cut for cut in cuts}
    ranks = {side: cut.rank for kind, cut in by_kind.items() for side in _SIDES[kind]}
    layers = attention.layers(list(by_kind))
    new: Replacements = {}
    for layer, sides in layers.items():
        heads = [(attention.count(side), ranks.get(side, attention.rank(side))) for side in sides]
        width = layer.dense_width if isinstance(layer, HeadProjection) else attention.rank(sides[0])
        new[layer] = HeadProjection.empty_like(layer, heads, width=width, is_output=sides == [Side.OUTPUT])
    if next(iter(layers)).get_parameter("weight").is_meta:
        return new
    values = {side: attention.projection(side) for sides in layers.values() for side in sides}
    for kind, cut in by_kind.items():
        left, right = _SIDES[kind]
        if cut.init in DRAWN_METHODS:
            for side in (left, right):
                values[side] = _drawn(attention, side, cut, draw(attention.spans[side].layer))
        else:
            truncate = truncate_qk if kind == "qk" else truncate_ov
            values[left], values[right] = truncate(values[left], values[right], cut.rank, moments, cut.init)
    after = attention.after(new)
    for side, (weight, bias) in ((side, (value.weight, value.bias)) for side, value in values.items()):
        if side == Side.OUTPUT:
            after.spans[side].set_(weight.transpose(0, 1).flatten(1), bias)
        else:
            after.spans[side].set_(weight.mT.flatten(0, 1), None if bias is None else bias.flatten())
    return new


def _drawn(attention: Attention, side: int, cut: Cut, draw: Draw) -> HeadWeights:
    """Return a projection that is drawn as a layer of its own; biases of heads start at zero."""
    present, count = attention.projection(side), attention.count(side)
    size, is_output = present.weight.shape[1], side == Side.OUTPUT
    weight = present.weight.new_empty((size, count * cut.rank) if is_output else (count * cut.rank, size))
    if cut.init == "he":
        weight.normal_(0.0, math.sqrt(2 / weight.shape[1]))
    elif draw is None:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    else:
        draw(weight)
    if is_output:
        return HeadWeights(weight.unflatten(1, (count, -1)).transpose(0, 1), present.bias)
    bias = None if present.bias is None else torch.zeros_like(present.bias[:, : cut.rank])
    return HeadWeights(weight.unflatten(0, (count, -1)).mT, bias)
