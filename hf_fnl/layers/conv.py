"""A two-dimensional convolution whose kernel, seen as a matrix, is a product of factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fnl.config import CONV_SCHEMES
from hf_fnl.layers.base import Factorized
from hf_fnl.spectral import spectral_init

Pair = tuple[int, int]  # height, width
KernelShape = tuple[int, int, int, int]  # (out, in / groups, height, width)


def kernel_matrix(kernel: Tensor, scheme: str) -> Tensor:
    """A kernel ``(out, in, kh, kw)`` as the matrix of its scheme.

    Returns:
        ``(out * kh, in * kw)`` for ``"spatial"``, ``(out, in * kh * kw)`` for ``"channel"``.
    """
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


def factor_kernels(U: Tensor, V: Tensor, shape: KernelShape, scheme: str) -> tuple[Tensor, Tensor]:
    """The factors of a kernel as kernels of two convolutions, and as views of ``U`` and ``V``.

    Returns:
        The kernel that is applied first, from ``V``: a row ``(r, in, 1, kw)`` or ``(r, in, kh, kw)``; and the second,
        from ``U``: a column ``(out, r, kh, 1)`` or ``(out, r, 1, 1)``.
    """
    out_channels, in_channels, height, width = shape
    if scheme == "channel":
        return V.mT.unflatten(1, (in_channels, height, width)), U[..., None, None]
    row = V.mT.unflatten(1, (in_channels, width)).unsqueeze(2)
    return row, U.unflatten(0, (out_channels, height)).transpose(1, 2).unsqueeze(3)


class FactorizedConv2d(Factorized):
    r"""A convolution whose kernel is ``W = U V^T`` as a matrix, applied as two with ``rank`` channels between.

    - ``"spatial"`` (Khodak et al. 2021, after Tai et al. 2016): ``W`` is ``(out * kh, in * kw)``; a row ``1 x kw`` of
      ``V``, then a column ``kh x 1`` of ``U``.
    - ``"channel"`` (Kamalakara et al. 2022): ``W`` is ``(out, in * kh * kw)``; ``kh x kw`` into ``rank`` channels by
      ``V``, then ``1 x 1`` by ``U``.

    Where that takes fewer operations on an input, and always when overcomplete, the kernel is multiplied out and
    applied at once. With ``groups`` the groups share ``V``, so that the kernel of all of them is one product.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width, or one number for both.
        rank: Columns of ``U`` and ``V``.
        stride: As in :class:`torch.nn.Conv2d`, like all options up to ``padding_mode``.
        padding: One number, two, ``"same"`` or ``"valid"``.
        dilation: Spacing of the kernel's points.
        groups: Blocks of channels that do not see each other.
        bias: Adds a learned ``bias (out_channels,)``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        scheme: ``"spatial"`` or ``"channel"``.
        compose: Whether the kernel is multiplied out in the forward pass; ``None`` chooses by the operations.
        init: ``"spectral"``, ``"spectral_ones"`` or ``"default"``; see :class:`~hf_fnl.layers.base.Factorized`.
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
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, _pair(dense.kernel_size)
        self.stride, self.dilation, self.padding = _pair(dense.stride), _pair(dense.dilation), dense.padding
        self.groups, self.padding_mode, self.scheme, self.compose = groups, padding_mode, scheme, compose
        self._pads = _pads(dense)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def dense_shape(self) -> KernelShape:
        """Shape of the dense kernel."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def dense_weight(self) -> Tensor:
        """The dense kernel."""
        return matrix_kernel(self.composed(), self.dense_shape, self.scheme)

    def draw_(self, weight: Tensor) -> None:
        """Draw a kernel as :class:`torch.nn.Conv2d` does."""
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def outer_factors(self, draw: Callable[[Tensor], object]) -> tuple[Tensor, Tensor]:
        """New ``U`` and ``V`` from kernels that ``draw`` fills: the dense one, or those of the two convolutions."""
        if self.init == "default":
            U, V = torch.empty_like(self.U), torch.empty_like(self.V)
            for kernel in factor_kernels(U, V, self.dense_shape, self.scheme):
                draw(kernel)
            return U, V
        kernel = self.U.new_empty(self.dense_shape)
        draw(kernel)
        return spectral_init(kernel_matrix(kernel, self.scheme), self.rank, self.init)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors, then the bias, as :class:`torch.nn.Conv2d` draws its own."""
        super().reset_parameters()
        if self.bias is not None and not self.bias.is_meta:
            bound = 1 / math.sqrt(math.prod(self.dense_shape[1:]))
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``([batch,] in_channels, height, width)`` to ``([batch,] out_channels, new height, new width)``."""
        left, right, top, bottom = self._pads
        padding = (top, left)
        if self.padding_mode != "zeros" or left != right or top != bottom:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._pads, mode=mode), (0, 0)
        if self._composing_is_cheaper(x, padding) if self.compose is None else self.compose:
            kernel = self.dense_weight().contiguous()
            return F.conv2d(x, kernel, self.bias, self.stride, padding, self.dilation, self.groups)
        return self._in_two_steps(x, padding)

    def _in_two_steps(self, x: Tensor, padding: Pair) -> Tensor:
        U = self.U if self.M is None else self.U @ self.M
        first, second = factor_kernels(U, self.V, self.dense_shape, self.scheme)
        # Contiguous, as the memory format of the output follows that of the kernel as well as that of the input.
        first, second = first.repeat(self.groups, 1, 1, 1).contiguous(), second.contiguous()
        if self.scheme == "channel":
            x = F.conv2d(x, first, None, self.stride, padding, self.dilation, self.groups)
            return F.conv2d(x, second, self.bias, groups=self.groups)
        (sh, sw), (ph, pw), (dh, dw) = self.stride, padding, self.dilation
        x = F.conv2d(x, first, None, (1, sw), (0, pw), (1, dw), self.groups)
        return F.conv2d(x, second, self.bias, (sh, 1), (ph, 0), (dh, 1), self.groups)

    def _composing_is_cheaper(self, x: Tensor, padding: Pair) -> bool:
        """Compare multiplications; the kernel is multiplied out once for a whole batch."""
        m, n = self.shape
        if self.rank > min(m, n):  # two steps would also keep `rank` channels for the backward pass
            return True
        batch, (height, width) = x.shape[0] if x.ndim == 4 else 1, x.shape[-2:]
        new_height, new_width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                (height, width), padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        points = batch * new_height * new_width
        first_points = batch * height * new_width if self.scheme == "spatial" else points
        in_two_steps = self.rank * (first_points * self.groups * n + points * m)
        return m * n * self.rank + points * math.prod(self.dense_shape) < in_two_steps

    @classmethod
    def from_dense(
        cls, dense: nn.Conv2d, rank: int, *, init: str = "spectral", scheme: str = "spatial"
    ) -> FactorizedConv2d:
        """Split the kernel of a convolution, which is left as it is.

        Args:
            dense: The convolution to split; its options, device, dtype, bias and ``requires_grad`` carry over. On the
                meta device only the shapes do.
            rank: Singular triples kept, at most the smaller side of the matrix of ``scheme``.
            init: ``"spectral"`` or ``"spectral_ones"``.
            scheme: ``"spatial"`` or ``"channel"``.

        Raises:
            ValueError: If an option is not allowed, the kernel is not finite, or the convolution is depthwise.
        """
        layer = cls.empty_like(dense, rank, init=init, scheme=scheme)
        if not layer.U.is_meta:
            layer.set_factors_(spectral_init(kernel_matrix(dense.weight, scheme), rank, init))
            if dense.bias is not None:
                layer.bias.detach().copy_(dense.bias)
        return layer

    @classmethod
    def empty_like(
        cls, dense: nn.Conv2d, rank: int, *, init: str = "spectral", scheme: str = "spatial"
    ) -> FactorizedConv2d:
        """A convolution in the place of ``dense`` whose parameters are not set yet; nothing is drawn or decomposed.

        Options, device, dtype, ``requires_grad`` and mode carry over.
        """
        layer = cls(**_options(dense), rank=rank, scheme=scheme, init=init, device="meta", dtype=dense.weight.dtype)
        return layer.placed_like(dense)

    def to_dense(self) -> nn.Conv2d:
        """The plain convolution with the kernel multiplied out; this layer is left as it is."""
        dense = nn.utils.skip_init(nn.Conv2d, **_options(self), device=self.U.device, dtype=self.U.dtype)
        return self.fill_dense_(dense)

    def extra_repr(self) -> str:
        """Sizes, the rank and the scheme, then the options that differ from the defaults."""
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        options = [f"{name}={value}" for name, value in _options(self).items() if value != defaults.get(name, value)]
        options += ["bias=False"] * (self.bias is None) + ["deep=True"] * (self.M is not None)
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        return ", ".join([sizes, f"scheme={self.scheme}", *options])


def _options(layer: nn.Conv2d | FactorizedConv2d) -> dict[str, Any]:
    """What a convolution was made with, under the names of the constructor of :class:`torch.nn.Conv2d`."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def _pair(sizes: tuple[int, ...]) -> Pair:
    height, width = sizes
    return height, width


def _pads(dense: nn.Conv2d) -> tuple[int, int, int, int]:
    """Padding left, right, above and below, as :func:`torch.nn.functional.pad` reads it."""
    if isinstance(dense.padding, str):
        same = dense.padding == "same"
        sizes = zip(dense.dilation, dense.kernel_size, strict=True)
        height, width = (dilation * (kernel - 1) if same else 0 for dilation, kernel in sizes)
        return width // 2, width - width // 2, height // 2, height - height // 2
    height, width = dense.padding
    return width, width, height, height
