"""A linear layer whose weight is a product of factors, and parts of plain linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers.base import FactorizedMatrix
from hf_fnl.math.factors import product
from hf_fnl.math.truncation import Moments, truncate_linear

if TYPE_CHECKING:
    from typing_extensions import Self


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
            :class:`~hf_fnl.layers.base.FactorizedMatrix`.
        deep: Holds ``W = U M V^T`` with ``M`` starting as the identity.
        overcomplete: Allows ``rank > min(in_features, out_features)``.

    Raises:
        ValueError: If ``rank`` or ``init`` is not allowed.
    """

    kind = "linear"
    dense_classes = (nn.Linear, Conv1D)

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
        return self.matrix_of(product(*factors))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)`` through the ``rank``-wide middle."""
        x = x @ self.V
        if self.M is not None:
            x = F.linear(x, self.M)
        return F.linear(x, self.U, self.bias)

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls, dense: nn.Linear | Conv1D, rank: int, *, moments: Moments | None = None, **options: Any
    ) -> FactorizedLinear:
        """As in :class:`~hf_fnl.layers.base.Factorized`, of GPT-2's ``Conv1D`` as well, and in the metric of data.

        Args:
            dense: The layer to split; it is left as it is.
            rank: Singular triples kept, ``1 <= rank <= min(in_features, out_features)``.
            moments: Of the layer's inputs: the product is then the one whose outputs are nearest to those of the layer
                in mean square, and the bias takes over the mean of what is lost.
            **options: ``init`` and ``deep``; with ``moments`` the former is ``"spectral"``.
        """
        if moments is None:
            return super().from_dense(dense, rank, **options)
        if (init := options.get("init", "spectral")) != "spectral":
            raise ValueError(f"moments cut a trained weight and need init='spectral', got {init!r}")
        layer = cls.empty_like(dense, rank, **options)
        U, V, bias = truncate_linear(dense_weight(dense), dense.bias, rank, moments)
        layer.set_factors_(layer.with_identity(U, V))
        layer.set_bias_(bias)
        return layer

    @classmethod
    def options_like(cls, dense: nn.Linear | Conv1D) -> dict[str, Any]:
        """Return its sizes, and whether it has a bias."""
        out_features, in_features = dense_weight(dense).shape
        return {"in_features": in_features, "out_features": out_features, "bias": dense.bias is not None}

    def placed_like(self, dense: nn.Module) -> Self:
        """As in :class:`~hf_fnl.layers.base.Factorized`; the class carries over, too."""
        self.dense_class = Conv1D if isinstance(dense, Conv1D) else nn.Linear
        return super().placed_like(dense)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The weight as ``(out_features, in_features)``, which ``Conv1D`` holds transposed."""
        return weight.mT if self.dense_class is Conv1D else weight

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


@dataclass(frozen=True)
class Span:
    """Outputs of a linear layer that follow one another: all of them, or the queries of a layer that gives keys too.

    Args:
        layer: The layer.
        start: First output.
        length: Number of outputs; ``None`` for all from ``start`` on.
    """

    layer: nn.Linear | Conv1D
    start: int = 0
    length: int | None = None

    def of(self, outputs: Tensor, dim: int = -1) -> Tensor:
        """These outputs among all, which lie along ``dim``; a view."""
        length = outputs.shape[dim] - self.start if self.length is None else self.length
        return outputs.narrow(dim, self.start, length)

    @property
    def weight(self) -> Tensor:
        """Their rows ``(length, in_features)`` of the weight, which ``Conv1D`` holds transposed; a view."""
        return self.of(dense_weight(self.layer), 0)

    @property
    def bias(self) -> Tensor | None:
        """Their part of the bias; a view."""
        return None if self.layer.bias is None else self.of(self.layer.bias)

    @torch.no_grad()
    def set_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write their rows of the weight, and their part of the bias if there is one."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
