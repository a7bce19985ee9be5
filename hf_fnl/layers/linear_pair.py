"""A product of two factors as two plain linear layers, for what knows only these: quantization, adapters, exports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers.linear import FactorizedLinear, dense_weight
from hf_fnl.layers.weight import HoldsFactors, refuse_write
from hf_fnl.math.factors import product

if TYPE_CHECKING:
    from typing_extensions import Self


class LinearPair(HoldsFactors, nn.Sequential):
    r"""``y = (x A^T) B^T + b``: two linear layers, ``A (rank, in)`` without a bias and then ``B (out, rank)`` with it.

    They are ``pair[0]`` and ``pair[1]``, of class ``torch.nn.Linear``, so that whatever is done to such layers can be
    done to them. In a state dict they are ``0.weight``, ``1.weight`` and ``1.bias``.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Size in between.
        bias: Whether the second layer has a bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        first = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        super().__init__(first, nn.Linear(rank, out_features, bias, device=device, dtype=dtype))
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.dense_class: type[nn.Linear | Conv1D] = nn.Linear
        self.shape = (out_features, in_features)

    @classmethod
    @torch.no_grad()
    def from_factorized(cls, layer: FactorizedLinear) -> Self:
        """Return the pair that computes what a factorized layer does; a middle factor goes into ``A``."""
        U, *middle, V = layer.factors()
        pair = cls.empty_like(layer, layer.rank)
        A = V.mT if not middle else middle[0] @ V.mT
        trained = any(factor.requires_grad for factor in (*middle, V)), U.requires_grad
        for half, weight, is_trained in zip(pair, (A, U), trained, strict=True):
            half.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), is_trained)
        pair[1].bias = layer.bias  # type: ignore[assignment]
        return pair

    @classmethod
    def empty_like(cls, layer: Any, rank: int) -> Self:
        """Return a pair in the place of a linear layer, a ``Conv1D`` or a factorized layer, not set yet."""
        is_factorized, transposed = isinstance(layer, FactorizedLinear), isinstance(layer, Conv1D)
        out_features, in_features = layer.shape if is_factorized else dense_weight(layer).shape
        weight = layer.factors()[0] if is_factorized else layer.weight
        with torch.device("meta"):
            pair = cls(in_features, out_features, rank, layer.bias is not None, dtype=weight.dtype)
        pair.to_empty(device=weight.device).requires_grad_(weight.requires_grad)
        pair.dense_class = layer.dense_class if is_factorized else Conv1D if transposed else nn.Linear
        return pair.train(layer.training)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the second layer."""
        return self[1].bias  # type: ignore[return-value]

    def factors(self) -> tuple[Tensor, Tensor]:
        """``U (out, rank)`` and ``V (in, rank)`` of the product ``U V^T``."""
        return self[1].weight, self[0].weight.mT  # type: ignore[return-value]

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight, which ``Conv1D`` holds transposed."""
        return self.shape[::-1] if self.dense_class is Conv1D else self.shape

    def weight_from(self, *factors: Tensor) -> Tensor:
        """Return the dense layer's weight, which ``Conv1D`` holds transposed."""
        return product(*factors).mT if self.dense_class is Conv1D else product(*factors)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch, for ``bias`` in the second layer; a ``RuntimeError`` for ``"weight"``."""
        if name == "weight":
            refuse_write(self, "layer.weight = ...")
        self[1].register_parameter(name, param)

    @torch.no_grad()
    def to_dense(self) -> nn.Linear | Conv1D:
        """Return the plain layer, of the class that was split, with the two multiplied out; this one stays as it is."""
        sizes = (self.in_features, self.out_features, self.rank, self.bias is not None)
        layer = FactorizedLinear(*sizes, overcomplete=True, device="meta")
        layer.dense_class, layer.bias = self.dense_class, self.bias
        layer.U, layer.V = (nn.Parameter(factor, factor.requires_grad) for factor in self.factors())
        return layer.train(self.training).to_dense()
