"""Base class of factorized two-dimensional convolutions: options, both ways to compute them, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fnl.layers.base import Factorized
from hf_fnl.math.spectral import DRAWN_METHODS, draw_factor

if TYPE_CHECKING:
    pass

Pair = tuple[int, int]  # height, width
KernelShape = tuple[int, int, int, int]  # (out, in / groups, height, width)

# For each convolution of a chain, the axes along which its kernel extends.
_AXES = {
    "spatial": ("w", "h"),
    "channel": ("hw", ""),
    "tt": ("", "w", "h", ""),
    "tucker": ("", "hw", ""),
}


class Convolution(Factorized):
    """A convolution whose kernel is held as factors, and which is computed in one of two ways.

    Either the factors are the kernels of a chain of small convolutions, or they are multiplied out and the kernel is
    applied at once. Channels-last inputs give channels-last outputs.
    """

    dense_classes = (nn.Conv2d,)
    scheme: str
    compose: bool | None

    def take_options_(self, dense: nn.Conv2d) -> None:
        """Take over the options of a dense convolution."""
        self.in_channels, self.out_channels, self.kernel_size = dense.in_channels, dense.out_channels, dense.kernel_size
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation
        self.groups, self.padding_mode = dense.groups, dense.padding_mode
        self._pads = _pads(dense)

    @property
    def dense_shape(self) -> KernelShape:
        """Shape of the dense kernel."""
        height, width = self.kernel_size
        return self.out_channels, self.in_channels // self.groups, height, width

    def chain(self, *factors: Tensor) -> tuple[Tensor, ...]:
        """Factors as kernels of convolutions, in the order in which those are applied; views of the factors."""
        raise NotImplementedError

    def kernels(self) -> tuple[Tensor, ...]:
        """The kernels of the chain of convolutions, in the order in which they are applied."""
        return self.chain(*self.factors())

    def composing_cost(self) -> int:
        """Multiplications that it takes to multiply the factors out."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map ``([batch,] in_channels, height, width)`` to ``([batch,] out_channels, new height, new width)``."""
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        x, padding = self._padded(x)
        channels_last = _memory_format(x) is torch.channels_last
        x = _laid_out(x, channels_last) if channels_last else x
        kernels, axes = self.kernels(), _AXES[self.scheme]
        composes = self._composing_is_cheaper(kernels, x, padding) if self.compose is None else self.compose
        if composes:
            kernels, axes = (self.dense_weight(),), ("hw",)
        for kernel, along in zip(kernels, axes, strict=True):
            bias = self.bias if kernel is kernels[-1] else None
            options = _along(along, self.stride, 1), _along(along, padding, 0), _along(along, self.dilation, 1)
            x = F.conv2d(x, _laid_out(kernel, channels_last), bias, *options, self.groups)
        return x

    def _padded(self, x: Tensor) -> tuple[Tensor, Pair]:
        """The input, padded where the convolution cannot do it, and the padding that is left to it."""
        left, right, top, bottom = self._pads
        if self.padding_mode == "zeros" and left == right and top == bottom:
            return x, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._pads, mode=mode).contiguous(memory_format=_memory_format(x)), (0, 0)

    def _positions_after(self, x: Tensor, padding: Pair) -> list[int]:
        """Height and width of the output."""
        sizes = zip(x.shape[-2:], padding, self.dilation, self.kernel_size, self.stride, strict=True)
        return [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in sizes
        ]

    def _composing_is_cheaper(self, kernels: Sequence[Tensor], x: Tensor, padding: Pair) -> bool:
        """Compare multiplications of both ways; the kernel is multiplied out once for a whole batch.

        A backward pass takes twice as many, of the product, too, so that the way is the same in training.
        """
        positions, after, chained = list(x.shape[-2:]), self._positions_after(x, padding), 0
        for kernel, along in zip(kernels, _AXES[self.scheme], strict=True):
            positions = [new if axis in along else old for axis, old, new in zip("hw", positions, after, strict=True)]
            chained += kernel.numel() * math.prod(positions)
        at_once = math.prod(self.dense_shape) * math.prod(after)
        return self.composing_cost() < x.shape[0] * (chained - at_once)

    @torch.no_grad()
    def fresh_factors(self, draw: Callable[[Tensor], object] | None = None) -> tuple[Tensor, ...]:
        """As in :class:`Factorized`; ``draw`` fills the dense kernel, or those of :meth:`drawn_factors`."""
        draw = draw or self.draw_
        if self.init in DRAWN_METHODS:
            return self.drawn_factors(draw)
        kernel = self.factors()[0].new_empty(self.dense_shape)
        draw(kernel)
        return self.split(kernel)

    def drawn_factors(self, draw: Callable[[Tensor], object]) -> tuple[Tensor, ...]:
        """New factors, each drawn as the kernel of its convolution."""
        drawn = tuple(torch.empty_like(factor) for factor in self.factors())
        for kernel in self.chain(*drawn):
            draw_factor(kernel, draw, self.init)
        return drawn

    @classmethod
    def options_like(cls, dense: nn.Conv2d) -> dict[str, Any]:
        """Return the options that both have."""
        return options_of(dense)

    def to_dense(self) -> nn.Conv2d:
        """The plain convolution with the kernel multiplied out; this layer is left as it is."""
        first = self.factors()[0]
        dense = nn.utils.skip_init(nn.Conv2d, **options_of(self), device=first.device, dtype=first.dtype)
        return self.fill_dense_(dense)

    def extra_repr(self) -> str:
        """Sizes, the rank and the scheme, then the options that differ from the defaults."""
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        options = [f"{name}={value}" for name, value in options_of(self).items() if value != defaults.get(name, value)]
        options += ["bias=False"] * (self.bias is None)
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}"
        return ", ".join([sizes, f"scheme={self.scheme}", *options])


def options_of(layer: nn.Conv2d | Convolution) -> dict[str, Any]:
    """Return the arguments that a convolution was made with, as :class:`torch.nn.Conv2d` names them."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def _laid_out(kernel: Tensor, channels_last: bool) -> Tensor:
    """A kernel in the layout of the input, for the output's follows both.

    Views may have other strides along axes of length 1, which ``contiguous`` leaves as they are: grouped convolutions
    of torch then compute something else, and the gradient of one image is an error.
    """
    _, channels, height, width = kernel.shape
    contiguous, last = (height * width, width, 1), (1, width * channels, channels)
    if kernel.stride() == (channels * height * width, *(last if channels_last else contiguous)):
        return kernel
    return kernel.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _along(along: str, values: Sequence[int], neutral: int) -> list[int]:
    """An option of height and width, neutral along the axis where a convolution of a chain does not extend."""
    return [value if axis in along else neutral for axis, value in zip("hw", values, strict=True)]


def _memory_format(x: Tensor) -> torch.memory_format:
    """Channels-last if a tensor lies so in memory and not also as a contiguous one."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _pads(dense: nn.Conv2d) -> tuple[int, int, int, int]:
    """Padding left, right, above and below, as :func:`torch.nn.functional.pad` reads it."""
    if isinstance(dense.padding, str):
        same = dense.padding == "same"
        sizes = zip(dense.dilation, dense.kernel_size, strict=True)
        height, width = (dilation * (kernel - 1) if same else 0 for dilation, kernel in sizes)
        return width // 2, width - width // 2, height // 2, height - height // 2
    height, width = dense.padding
    return width, width, height, height
