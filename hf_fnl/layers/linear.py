"""A linear layer whose weight is a product of factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers.base import Factorized
from hf_fnl.spectral import spectral_init


class FactorizedLinear(Factorized):
    r"""``y = x V U^T + b``: a linear layer with ``W = U V^T`` of shape ``(out_features, in_features)``.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        rank: Columns of ``U (out_features, rank)`` and ``V (in_features, rank)``.
        bias: Adds a learned ``bias (out_features,)``.
        init: ``"spectral"``, ``"spectral_ones"`` or ``"default"``; see :class:`~hf_fnl.layers.base.Factorized`.
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
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def draw_(self, weight: Tensor) -> None:
        """Draw as :class:`torch.nn.Linear` does."""
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors, then the bias, as :class:`torch.nn.Linear` draws its own."""
        super().reset_parameters()
        if self.bias is not None and not self.bias.is_meta:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)`` through the ``rank``-wide middle."""
        x = x @ self.V
        if self.M is not None:
            x = F.linear(x, self.M)
        return F.linear(x, self.U, self.bias)

    @classmethod
    def from_dense(cls, dense: nn.Linear | Conv1D, rank: int, *, init: str = "spectral") -> FactorizedLinear:
        """Split the weight of a linear layer (or GPT-2's ``Conv1D``), which is left as it is.

        Args:
            dense: The layer to split; device, dtype, bias and ``requires_grad`` carry over. On the meta device only
                the shapes do.
            rank: Singular triples kept, ``1 <= rank <= min(in_features, out_features)``.
            init: ``"spectral"`` or ``"spectral_ones"``.

        Raises:
            ValueError: If ``rank`` or ``init`` is not allowed, or the weight is not finite.
        """
        layer = cls.empty_like(dense, rank, init=init)
        if not layer.U.is_meta:
            weight = dense.weight.mT if isinstance(dense, Conv1D) else dense.weight
            layer.set_factors_(spectral_init(weight, rank, init))
            if dense.bias is not None:
                layer.bias.detach().copy_(dense.bias)
        return layer

    @classmethod
    def empty_like(cls, dense: nn.Linear | Conv1D, rank: int, *, init: str = "spectral") -> FactorizedLinear:
        """A layer in the place of ``dense`` whose parameters are not set yet; nothing is drawn or decomposed.

        Device, dtype, ``requires_grad`` and mode carry over.
        """
        out_features, in_features = dense.weight.mT.shape if isinstance(dense, Conv1D) else dense.weight.shape
        bias = dense.bias is not None
        layer = cls(in_features, out_features, rank, bias, init=init, device="meta", dtype=dense.weight.dtype)
        layer = layer.on_device_of(dense.weight)
        for factor in layer.factors():
            factor.requires_grad_(dense.weight.requires_grad)
        if dense.bias is not None:
            layer.bias.requires_grad_(dense.bias.requires_grad)
        return layer.train(dense.training)

    def to_dense(self) -> nn.Linear:
        """The plain layer with ``W`` multiplied out; this layer is left as it is."""
        dense = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.U.device,
            dtype=self.U.dtype,
        )
        if not self.U.is_meta:
            dense.weight.detach().copy_(self.composed())
            if self.bias is not None:
                dense.bias.detach().copy_(self.bias)
        dense.weight.requires_grad_(self.U.requires_grad)
        if self.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, as :class:`torch.nn.Linear` shows them, and the rank."""
        deep = ", deep=True" if self.M is not None else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}{deep}"
        )
