"""A two-dimensional convolution whose kernel, seen as a matrix, is a product of factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_fnl.layers.base import FactorizedMatrix
from hf_fnl.layers.conv_base import Convolution, KernelShape, Pair
from hf_fnl.math.factors import product
from hf_fnl.math.spectral import draw_factor

CONV_SCHEMES = ("spatial", "channel")  # a kernel as a matrix


def kernel_matrix(kernel: Tensor, scheme: str) -> Tensor:
    """A kernel as ``(out * kh, in * kw)`` for ``"spatial"``, ``(out, in * kh * kw)`` for ``"channel"``."""
    if scheme not in CONV_SCHEMES:
        raise ValueError(f"scheme of a convolution must be one of {', '.join(CONV_SCHEMES)}, got {scheme!r}")
    if scheme == "channel":
        return kernel.flatten(1)
    return kernel.transpose(1, 2).flatten(2).flatten(0, 1)


def matrix_kernel(matrix: Tensor, shape: KernelShape, scheme: str) -> Tensor:
    """The kernel of a shape that :func:`kernel_matrix` maps to ``matrix``."""
    out_channels, in_channels, height, width = shape
    if scheme == "channel":
        return matrix.unflatten(1, (in_channels, height, width))
    return matrix.unflatten(1, (in_channels, width)).unflatten(0, (out_channels, height)).transpose(1, 2)


class FactorizedConv2d(Convolution, FactorizedMatrix):
    r"""A convolution whose kernel is ``W = U V^T`` as a matrix, applied as two with ``rank`` channels between.

    - ``"spatial"`` (Khodak et al. 2021, after Tai et al. 2016): ``W`` is ``(out * kh, in * kw)``; a row ``1 x kw`` of
      ``V``, then a column ``kh x 1`` of ``U``.
    - ``"channel"`` (Kamalakara et al. 2022): ``W`` is ``(out, in * kh * kw)``; ``kh x kw`` into ``rank`` channels by
      ``V``, then ``1 x 1`` by ``U``.

    Where that takes fewer operations on an input, and always at a rank above that of ``W``, the kernel is multiplied
    out and applied at once. With ``groups`` the groups share ``V``, so that the kernel of all of them is one product.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width, or one number for both.
        rank: Columns of ``U`` and ``V``.
        stride: As in :class:`torch.nn.Conv2d`, like all options up to ``padding_mode``.
        scheme: ``"spatial"`` or ``"channel"``.
        compose: Whether the kernel is multiplied out in the forward pass; ``None`` chooses by the operations.
        init: ``"spectral"``, ``"spectral_ones"``, ``"default"`` or ``"he"``; see
            :class:`~hf_fnl.layers.base.FactorizedMatrix`.
        deep: Holds ``W = U M V^T`` with ``M`` starting as the identity.
        overcomplete: Allows a rank above that of ``W``.

    Raises:
        ValueError: If an option is not allowed, or the convolution is depthwise: its small filters are no product.
    """

    kind = "conv"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        rank: int,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        scheme: str = "spatial",
        compose: bool | None = None,
        init: str = "spectral",
        deep: bool = False,
        overcomplete: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        dense = nn.Conv2d(*sizes, device="meta")  # type: ignore[arg-type]  # torch's own checks and defaults
        if dense.groups > 1 and dense.groups == dense.in_channels:
            raise ValueError(f"a depthwise convolution cannot be factorized (groups = in_channels = {groups})")
        shape = kernel_matrix(dense.weight, scheme).shape
        super().__init__(
            (shape[0], shape[1]), rank, init=init, deep=deep, overcomplete=overcomplete, device=device, dtype=dtype
        )
        self.take_options_(dense)
        self.scheme, self.compose = scheme, compose
        self.add_bias_(out_channels if bias else None)
        self.reset_parameters()

    def weight_from(self, *factors: Tensor) -> Tensor:
        """The dense kernel."""
        return matrix_kernel(product(*factors), self.dense_shape, self.scheme)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The kernel as the matrix of the scheme."""
        return kernel_matrix(weight, self.scheme)

    def drawn_factors(self, draw: Callable[[Tensor], object]) -> tuple[Tensor, ...]:
        """New factors: ``V`` drawn as the first kernel, ``U`` as a matrix, whose fan-in is the rank.

        In both schemes, as in the code of Khodak et al. 2021.
        """
        U, V = torch.empty_like(self.U), torch.empty_like(self.V)
        first, _ = self.chain(U, V)
        for kernel in (first, U[..., None, None]):
            draw_factor(kernel, draw, self.init)
        return self.with_identity(U, V)

    def chain(self, *factors: Tensor) -> tuple[Tensor, ...]:
        """``V`` as ``(r, in, 1, kw)`` or ``(r, in, kh, kw)``, then ``U`` as ``(out, r, kh, 1)`` or ``1 x 1``."""
        U, V = factors
        out_channels, in_channels, height, width = self.dense_shape
        if self.scheme == "channel":
            return V.mT.unflatten(1, (in_channels, height, width)), U[..., None, None]
        row = V.mT.unflatten(1, (in_channels, width)).unsqueeze(2)
        return row, U.unflatten(0, (out_channels, height)).transpose(1, 2).unsqueeze(3)

    def kernels(self) -> tuple[Tensor, ...]:
        """The kernels of the two convolutions; ``M`` is multiplied to ``U``."""
        first, second = self.chain(self.U if self.M is None else self.U @ self.M, self.V)
        return first.repeat(self.groups, 1, 1, 1) if self.groups > 1 else first, second

    def composing_cost(self) -> int:
        """Multiplications of ``U V^T``."""
        m, n = self.shape
        return m * n * self.rank

    def _composing_is_cheaper(self, kernels: Sequence[Tensor], x: Tensor, padding: Pair) -> bool:
        # At a rank above that of W, a chain would also have more channels between.
        return self.rank > min(self.shape) or super()._composing_is_cheaper(kernels, x, padding)

    def extra_repr(self) -> str:
        """Sizes, the rank and the scheme, then the options that differ from the defaults."""
        return super().extra_repr() + (", deep=True" if self.M is not None else "")
