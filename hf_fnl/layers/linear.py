"""A linear layer whose weight is a product of factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers.base import FactorizedMatrix
from hf_fnl.math.factors import product
from hf_fnl.math.spectral import spectral_init
from hf_fnl.math.truncation import Moments, truncate_linear


def dense_weight(layer: nn.Linear | Conv1D) -> Tensor:
    """The weight as ``(out_features, in_features)``, which ``Conv1D`` holds transposed."""
    return layer.weight.mT if isinstance(layer, Conv1D) else layer.weight


class FactorizedLinear(FactorizedMatrix):
    r"""``y = x V U^T + b``: a linear layer with ``W = U V^T`` of shape ``(out_features, in_features)``.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Columns of ``U (out_features, rank)`` and ``V (in_features, rank)``.
        bias: Adds a learned ``bias (out_features,)``.
        init: ``"spectral"``, ``"spectral_ones"``, ``"default"`` or ``"he"``; see
            :func:`~hf_fnl.math.spectral.initial_factors`.
        deep: Holds ``W = U M V^T`` with ``M`` starting as the identity.
        overcomplete: Allows ``rank > min(in_features, out_features)``.

    Raises:
        ValueError: If ``rank`` or ``init`` is not allowed.
    """

    kind = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        init: str = "spectral",
        deep: bool = False,
        overcomplete: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            rank,
            init=init,
            deep=deep,
            overcomplete=overcomplete,
            device=device,
            dtype=dtype,
        )
        self.in_features, self.out_features = in_features, out_features
        self.dense_class: type[nn.Linear | Conv1D] = nn.Linear
        self.add_bias_(out_features if bias else None)
        self.reset_parameters()

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight, which ``Conv1D`` holds transposed."""
        return self.shape[::-1] if self.dense_class is Conv1D else self.shape

    def weight_from(self, *factors: Tensor) -> Tensor:
        """The dense layer's weight, which ``Conv1D`` holds transposed."""
        weight = product(*factors)
        return weight.mT if self.dense_class is Conv1D else weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)`` through the ``rank``-wide middle."""
        x = x @ self.V
        if self.M is not None:
            x = F.linear(x, self.M)
        return F.linear(x, self.U, self.bias)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        dense: nn.Linear | Conv1D,
        rank: int,
        *,
        init: str = "spectral",
        deep: bool = False,
        moments: Moments | None = None,
    ) -> FactorizedLinear:
        """Split the weight of a linear layer (or GPT-2's ``Conv1D``), which is left as it is.

        Args:
            dense: The layer to split; device, dtype, bias and ``requires_grad`` carry over. On the meta device only
                the shapes do.
            rank: Singular triples kept, ``1 <= rank <= min(in_features, out_features)``.
            init: ``"spectral"`` or ``"spectral_ones"``.
            deep: Holds ``W = U M V^T`` with ``M`` starting as the identity.
            moments: Of the layer's inputs: the product is then the one whose outputs are nearest to those of the layer
                in mean square, and the bias takes over the mean of what is lost.

        Raises:
            ValueError: If ``rank`` or ``init`` is not allowed, or the weight is not finite.
        """
        layer = cls.empty_like(dense, rank, init=init, deep=deep)
        if layer.U.is_meta:
            return layer
        weight, bias = dense_weight(dense), dense.bias
        if moments is None:
            U, V = spectral_init(weight, rank, init)
        else:
            U, V, bias = truncate_linear(weight, bias, rank, moments)
        layer.set_factors_(layer.with_identity(U, V))
        layer.set_bias_(bias)
        return layer

    @classmethod
    def empty_like(
        cls,
        dense: nn.Linear | Conv1D,
        rank: int,
        *,
        init: str = "spectral",
        deep: bool = False,
        overcomplete: bool = False,
    ) -> FactorizedLinear:
        """A layer in the place of ``dense`` whose parameters are not set yet; nothing is drawn or decomposed.

        Device, dtype, ``requires_grad`` and mode carry over.
        """
        out_features, in_features = dense_weight(dense).shape
        layer = cls(
            in_features,
            out_features,
            rank,
            dense.bias is not None,
            init=init,
            deep=deep,
            overcomplete=overcomplete,
            device="meta",
            dtype=dense.weight.dtype,
        )
        layer.dense_class = Conv1D if isinstance(dense, Conv1D) else nn.Linear
        return layer.placed_like(dense)

    def to_dense(self) -> nn.Linear | Conv1D:
        """The plain layer with ``W`` multiplied out, of the class it was split from; this layer is left as it is."""
        with torch.device("meta"):
            if self.dense_class is Conv1D:
                dense = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        return self.fill_dense_(dense.to(self.U.dtype).to_empty(device=self.U.device))

    def extra_repr(self) -> str:
        """Sizes, as :class:`torch.nn.Linear` shows them, and the rank."""
        deep = ", deep=True" if self.M is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}{deep}"
        )
