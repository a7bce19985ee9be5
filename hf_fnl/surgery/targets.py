"""Targets of surgery: layers that share a weight, their sizes and their cut; heads are in another file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from hf_fnl.layers import (
    Factorized,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    FactorizedMatrix,
    TensorizedConv2d,
)
from hf_fnl.layers.base import computes_as
from hf_fnl.layers.conv import kernel_matrix
from hf_fnl.layers.linear import dense_weight
from hf_fnl.math.factors import kept_energy
from hf_fnl.math.spectral import DRAWN_METHODS
from hf_fnl.math.truncation import Moments, linear_energies
from hf_fnl.surgery.config import TENSOR_SCHEMES
from hf_fnl.surgery.measure import Request

if TYPE_CHECKING:
    from hf_fnl.surgery.heads import Target

LayerClass = type[FactorizedLinear] | type[FactorizedEmbedding] | type[FactorizedConv2d] | type[TensorizedConv2d]
Replacements: TypeAlias = dict[nn.Module, nn.Module]  # new modules by those in whose places they belong
Draw: TypeAlias = Callable[[Tensor], object] | None  # fills a weight in place

FACTORIZED_CLASSES: dict[type[nn.Module], LayerClass] = {
    stock: ours for ours in (FactorizedLinear, FactorizedEmbedding, FactorizedConv2d) for stock in ours.dense_classes
}


def stock_class(dense: type[nn.Module]) -> type[nn.Module] | None:
    """Return the stock class that a class is or is derived from, whether or not it computes the same."""
    return next((stock for stock in FACTORIZED_CLASSES if issubclass(dense, stock)), None)


def computes_otherwise(dense: type[nn.Module]) -> bool:
    """Return whether a class derived from a stock class has a forward pass of its own."""
    return not computes_as(dense, stock_class(dense) or nn.Module)


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
    """A target, and how it is cut.

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
        lost, total = (weight - layer.dense_weight()).square().sum(), weight.square().sum()
        return float(1 - lost / total) if total > 0 else 1.0
