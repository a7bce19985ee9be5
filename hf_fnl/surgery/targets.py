"""What can be cut: layers that share a weight, and the heads of an attention; each knows its sizes and its cut."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention.projections import AttentionProjections
from hf_fnl.layers import (
    Factorized,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FactorizedMatrix,
    HeadProjection,
    TensorizedConv2d,
)
from hf_fnl.layers.conv import kernel_matrix
from hf_fnl.layers.linear import dense_weight
from hf_fnl.layers.span import Span
from hf_fnl.math.factors import kept_energy
from hf_fnl.math.spectral import DRAWN_METHODS
from hf_fnl.math.truncation import (
    HeadMoments,
    Moments,
    Projection,
    linear_energies,
    ov_energies,
    qk_energies,
    truncate_ov,
    truncate_qk,
)
from hf_fnl.surgery.calibration import Heads, Request
from hf_fnl.surgery.config import TENSOR_SCHEMES

LayerClass = type[FactorizedLinear] | type[FactorizedEmbedding] | type[FactorizedConv2d] | type[TensorizedConv2d]
Replacements: TypeAlias = dict[nn.Module, nn.Module]  # new modules by those in whose places they belong
Draw: TypeAlias = Callable[[Tensor], object] | None  # fills a weight in place

FACTORIZED_CLASSES: dict[type[nn.Module], LayerClass] = {
    nn.Linear: FactorizedLinear,
    Conv1D: FactorizedLinear,
    nn.Embedding: FactorizedEmbedding,
    nn.Conv2d: FactorizedConv2d,
}


def stock_class(dense: type[nn.Module]) -> type[nn.Module] | None:
    """Return the stock class that a class is or is derived from, whether or not it computes the same."""
    return next((stock for stock in FACTORIZED_CLASSES if issubclass(dense, stock)), None)


def computes_otherwise(dense: type[nn.Module]) -> bool:
    """Return whether a class derived from a stock class has a forward pass of its own."""
    stock = stock_class(dense) or nn.Module
    methods = ("forward", "_conv_forward", "__call__", "__getattr__")
    return any(getattr(dense, name, None) is not getattr(stock, name, None) for name in methods)


def factorized_class(dense: type[nn.Module], scheme: str = "spatial") -> LayerClass | None:
    """Return the factorized class that takes the place of a dense one; ``scheme`` says how kernels are factorized.

    ``None`` for a class that computes otherwise than the stock one that it is derived from.
    """
    stock = stock_class(dense)
    ours = None if stock is None or computes_otherwise(dense) else FACTORIZED_CLASSES[stock]
    return TensorizedConv2d if ours is FactorizedConv2d and scheme in TENSOR_SCHEMES else ours


def empty_layer(dense: nn.Module, rank: int, *, scheme: str = "spatial", **options: Any) -> Factorized:
    """Return the factorized layer in the place of a dense one, with parameters that are not set yet.

    Args:
        dense: The dense layer.
        rank: Of the factors.
        scheme: How a kernel is factorized.
        **options: As the class of the layer takes them: ``init``, and except for tensors ``deep`` and
            ``overcomplete``.
    """
    ours: Any = factorized_class(type(dense), scheme)
    return ours.empty_like(dense, rank, **_scheme_option(ours, scheme), **options)


def share_factors_(layer: Factorized, other: Factorized) -> Factorized:
    """Let a layer hold the factors of another; returns it."""
    for name, factor in other.named_parameters(recurse=False):
        if name != "bias":
            setattr(layer, name, factor)
    return layer


def _scheme_option(ours: LayerClass, scheme: str) -> dict[str, str]:
    return {"scheme": scheme} if ours.kind in ("conv", "tensor") else {}


@dataclass(frozen=True)
class Cut:
    """How a target is cut.

    Args:
        target: What is cut.
        rank: Rank of the factors, or of each head.
        init: One of ``hf_fnl.math.spectral.INIT_METHODS``.
        deep: Holds ``U M V^T``.
        overcomplete: Allows ranks above that of the matrix.
    """

    target: Target
    rank: int
    init: str = "spectral"
    deep: bool = False
    overcomplete: bool = False


@dataclass(frozen=True)
class LayerTarget:
    """Layers that hold one weight and are factorized together.

    Args:
        layers: The layers by their first names, in the order of the model.
        scheme: How a kernel becomes a matrix.
    """

    layers: Mapping[str, nn.Module]
    scheme: str = "spatial"

    @property
    def name(self) -> str:
        """Name of the first layer."""
        return next(iter(self.layers))

    module_name = name

    @property
    def names(self) -> tuple[str, ...]:
        """Names by which patterns may mean it."""
        return tuple(self.layers)

    @property
    def first(self) -> Any:
        """The first layer."""
        return next(iter(self.layers.values()))

    @property
    def kind(self) -> str:
        """``"linear"``, ``"embedding"``, ``"conv"`` or ``"tensor"``."""
        ours = factorized_class(type(self.first), self.scheme)
        assert ours is not None
        return ours.kind

    @property
    def matrix(self) -> Tensor:
        """The weight as the matrix ``(m, n)`` that is factorized."""
        if isinstance(self.first, nn.Conv2d):
            return kernel_matrix(self.first.weight, self.scheme)
        return self.first.weight if isinstance(self.first, nn.Embedding) else dense_weight(self.first)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix or tensor."""
        return tuple(self.first.weight.shape if self.kind == "tensor" else self.matrix.shape)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The weights that have to be finite."""
        return (self.first.weight,)

    @property
    def parameters(self) -> int:
        """Parameters of the weight."""
        return self.first.weight.numel()

    def sizes(self, *, deep: bool = False, overcomplete: bool = False) -> tuple[int, Callable[[int], int], int]:
        """Return the largest rank, the parameters at a rank, and the rank that a rank scale of 1 stands for."""
        if self.kind == "tensor":
            kernel, scheme = self.first.weight.shape, self.scheme
            limit = TensorizedConv2d.largest_rank(kernel, scheme)
            return limit, lambda rank: TensorizedConv2d.parameter_count(kernel, rank, scheme), limit
        m, n = self.matrix.shape
        limit = sys.maxsize if overcomplete else min(m, n)
        full = m if isinstance(self.first, nn.Conv2d) and self.scheme == "spatial" else min(m, n)
        return limit, lambda rank: rank * (m + n + rank * deep), full

    @property
    def request(self) -> Request:
        """The moments of its inputs, where linear layers alone see those of a weight."""
        are_linear = all(factorized_class(type(layer)) is FactorizedLinear for layer in self.layers.values())
        return "inputs" if are_linear else None

    def energies(self, moments: Any) -> Tensor:
        """Return the squared singular values of the matrix, in the metric of its inputs where there are data."""
        return linear_energies(self.matrix, getattr(self.first, "bias", None), self._metric(moments))

    def _metric(self, moments: Moments | None) -> Moments | None:
        # About zero where layers share the weight, whose biases stay as they are.
        return moments if moments is None or len(self.layers) == 1 else moments.about_zero()

    def cut(self, cut: Cut, moments: Any, draw: Draw) -> dict[nn.Module, Factorized]:
        """Return the factorized layers by the dense ones, which stay as they are; on the meta device only shapes.

        Args:
            cut: The rank, and how factors start.
            moments: Of the inputs, if there are data.
            draw: Fills a dense weight as the model does.
        """
        options = {"init": cut.init} | {name: True for name in ("deep", "overcomplete") if getattr(cut, name)}
        ours: Any = factorized_class(type(self.first), self.scheme)
        layer: Factorized
        if moments is not None:
            layer = FactorizedLinear.from_dense(self.first, cut.rank, deep=cut.deep, moments=self._metric(moments))
        elif cut.init not in DRAWN_METHODS:
            layer = ours.from_dense(self.first, cut.rank, **_scheme_option(ours, self.scheme), **options)
        else:
            layer = empty_layer(self.first, cut.rank, scheme=self.scheme, **options)
            if not layer.factors()[0].is_meta:
                layer.set_factors_(layer.fresh_factors(draw))
        cut_layers: dict[nn.Module, Factorized] = {self.first: layer}
        for dense in list(self.layers.values())[1:]:
            partner = empty_layer(dense, cut.rank, scheme=self.scheme, **options)
            cut_layers[dense] = share_factors_(partner, layer)
            partner.set_bias_(getattr(dense, "bias", None))
        return cut_layers

    def parameters_after(self, layers: Mapping[nn.Module, Any]) -> int:
        """Return the parameters of the factors."""
        return sum(factor.numel() for factor in layers[self.first].factors())

    def kept_energy(self, layers: Mapping[nn.Module, Any]) -> float:
        """Return the share of ``||W||_F^2`` that the layers of :meth:`cut` keep."""
        layer = layers[self.first]
        if isinstance(layer, FactorizedMatrix):
            return kept_energy((self.matrix,), layer.U, layer.V)
        weight = self.first.weight.double()
        return float(1 - (weight - layer.dense_weight()).square().sum() / weight.square().sum())


_SIDES = {"qk": (0, 1), "ov": (2, 3)}  # of query, key, value and output


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
                layer = layers.get(getattr(side, "weight", None)) if not isinstance(side, Factorized) else None
                spans.append(None if layer is None else Span(layer, side.start, side.length))
        if any(spans[side] is None for side in _SIDES[kind]):
            return None
        query, key, value, output = spans
        return cls(name, (query, key, value, output), projections.num_heads, projections.num_kv_heads)

    def count(self, side: int) -> int:
        """Return the heads of a projection."""
        return self.num_heads if side in (0, 3) else self.num_kv_heads

    def rank(self, side: int) -> int:
        """Return the present width of the heads of a projection."""
        return self.spans[side].weight.shape[int(side == 3)] // self.count(side)

    def projection(self, side: int) -> Projection:
        """Return a projection head by head: ``(heads, d, r)``, and its bias."""
        span, count = self.spans[side], self.count(side)
        if side == 3:
            return Projection(span.weight.unflatten(1, (count, -1)).transpose(0, 1), span.bias)
        bias = None if span.bias is None else span.bias.unflatten(0, (count, -1))
        return Projection(span.weight.unflatten(0, (count, -1)).mT, bias)

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
                spans[side] = Span(new) if side == 3 else Span(new, start, count * rank)
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
        """Heads, and the shape of the product of one."""
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
    def request(self) -> Heads:
        """The moments of what the product is of."""
        (query, key, _, output), counts = self.attention.spans, (self.attention.num_heads, self.attention.num_kv_heads)
        return Heads(*counts, query=query, key=key) if self.kind == "qk" else Heads(*counts, output=output.layer)

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
        new[layer] = HeadProjection.empty_like(layer, heads, width=width, is_output=sides == [3])
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
        if side == 3:
            after.spans[side].set_(weight.transpose(0, 1).flatten(1), bias)
        else:
            after.spans[side].set_(weight.mT.flatten(0, 1), None if bias is None else bias.flatten())
    return new


def _drawn(attention: Attention, side: int, cut: Cut, draw: Draw) -> Projection:
    """Return a projection that is drawn as a layer of its own; biases of heads start at zero."""
    present, count = attention.projection(side), attention.count(side)
    size, is_output = present.weight.shape[1], side == 3
    weight = present.weight.new_empty((size, count * cut.rank) if is_output else (count * cut.rank, size))
    if cut.init == "he":
        weight.normal_(0.0, math.sqrt(2 / weight.shape[1]))
    elif draw is None:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    else:
        draw(weight)
    if is_output:
        return Projection(weight.unflatten(1, (count, -1)).transpose(0, 1), present.bias)
    bias = None if present.bias is None else torch.zeros_like(present.bias[:, : cut.rank])
    return Projection(weight.unflatten(0, (count, -1)).mT, bias)
