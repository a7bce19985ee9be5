"""What every factorized layer is: a module that holds one matrix as factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hf_fnl.functional import product
from hf_fnl.layers.weight import DenseWeight
from hf_fnl.spectral import check_method, check_rank, initial_factors

if TYPE_CHECKING:
    from typing_extensions import Self


Dense = TypeVar("Dense", bound=nn.Module)


class Factorized(nn.Module):
    """A layer whose matrix ``W`` of shape ``(m, n)`` is held as ``U V^T``, or as ``U M V^T`` when ``deep``.

    Args:
        shape: Shape ``(m, n)`` of the dense matrix.
        rank: Columns of the factors. At most ``min(m, n)``, any number where ``overcomplete``.
        init: One of ``hf_fnl.spectral.INIT_METHODS``. An overcomplete layer is drawn with ``"default"``.
        deep: Adds a middle factor ``M (rank, rank)``, which starts as the identity (Khodak et al. 2021, Sec. 5).
        overcomplete: Allows a rank above ``min(m, n)``, for training that is multiplied back afterwards.

    Raises:
        ValueError: If ``rank`` or ``init`` is not allowed.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        shape: tuple[int, int],
        rank: int,
        *,
        init: str = "spectral",
        deep: bool = False,
        overcomplete: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_method(init)
        if overcomplete and rank > min(shape):
            init = "default"
        else:
            check_rank(rank, min(shape))
        m, n = shape
        self.shape, self.rank, self.init, self.overcomplete = shape, rank, init, overcomplete
        self.U = nn.Parameter(torch.empty(m, rank, device=device, dtype=dtype))
        if deep:
            self.M = nn.Parameter(torch.empty(rank, rank, device=device, dtype=dtype))
        else:
            self.register_parameter("M", None)
        self.V = nn.Parameter(torch.empty(n, rank, device=device, dtype=dtype))

    def factors(self) -> tuple[Tensor, ...]:
        """The factors in the order in which they are multiplied: ``(U, V)`` or ``(U, M, V)``."""
        return (self.U, self.V) if self.M is None else (self.U, self.M, self.V)

    def composed(self) -> Tensor:
        """The dense matrix, shape ``(m, n)``."""
        return product(*self.factors())

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight."""
        return self.shape

    def dense_weight(self) -> Tensor:
        """The dense layer's weight: ``W`` in the layout that this layer has."""
        return self.composed()

    @property
    def weight(self) -> Tensor:
        """The dense layer's weight, for code that reads it; multiplied out when its values are used."""
        if torch.compiler.is_compiling():  # the compiler drops by itself what is not used
            return self.dense_weight()
        return DenseWeight.of(self.dense_shape, self.U, self.dense_weight)

    def draw_(self, weight: Tensor) -> None:
        """Fill a dense weight as the dense layer's own initialization would."""
        raise NotImplementedError

    @torch.no_grad()
    def fresh_factors(self, draw: Callable[[Tensor], object] | None = None) -> tuple[Tensor, ...]:
        """New initial values for :meth:`factors`, by the layer's ``init``.

        Args:
            draw: Fills a dense weight in place; :meth:`draw_` unless given.
        """
        U, V = self.outer_factors(draw or self.draw_)
        return (U, V) if self.M is None else (U, torch.eye(self.rank, dtype=U.dtype, device=U.device), V)

    def outer_factors(self, draw: Callable[[Tensor], object]) -> tuple[Tensor, Tensor]:
        """New initial values of ``U`` and ``V``; ``draw`` fills a dense weight in place."""
        return initial_factors(self.shape, self.rank, draw, method=self.init, dtype=self.U.dtype, device=self.U.device)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors anew; does nothing on the meta device."""
        if self.U.is_meta:
            return
        self.set_factors_(self.fresh_factors())

    def placed_like(self, dense: nn.Module) -> Self:
        """This layer, made on the meta device, on that of ``dense``, with its mode and what is trained of it.

        Parameters are not set yet.
        """
        weight = dense.get_parameter("weight")
        layer = self if weight.is_meta else self.to_empty(device=weight.device)
        for factor in layer.factors():
            factor.requires_grad_(weight.requires_grad)
        if getattr(dense, "bias", None) is not None:
            layer.get_parameter("bias").requires_grad_(dense.get_parameter("bias").requires_grad)
        return layer.train(dense.training)

    def to_dense(self) -> nn.Module:
        """The plain layer with ``W`` multiplied out; this layer is left as it is."""
        raise NotImplementedError

    @torch.no_grad()
    def fill_dense_(self, dense: Dense) -> Dense:
        """Give a dense layer the product of the factors, the bias, the mode and what is trained; returns it."""
        weight, bias = dense.get_parameter("weight"), getattr(self, "bias", None)
        if not self.U.is_meta:
            weight.copy_(self.dense_weight())
        weight.requires_grad_(self.U.requires_grad)
        if bias is not None:
            if not bias.is_meta:
                dense.get_parameter("bias").copy_(bias)
            dense.get_parameter("bias").requires_grad_(bias.requires_grad)
        return dense.train(self.training)

    @torch.no_grad()
    def set_factors_(self, values: tuple[Tensor, ...]) -> None:
        """Copy ``values`` into the factors, in the order of :meth:`factors`."""
        for parameter, value in zip(self.factors(), values, strict=True):
            parameter.copy_(value)
