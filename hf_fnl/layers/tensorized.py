"""A two-dimensional convolution whose kernel is a Tensor-Train or a Tucker-2 decomposition."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_fnl.layers.conv_base import Convolution, KernelShape, Pair
from hf_fnl.math.spectral import check_rank
from hf_fnl.math.tensors import Shape, core_shapes, decompose, largest_bonds, product, product_cost

# The parameters that hold the cores, in the order in which these are multiplied.
_CORES = {"tt": ("out_core", "height_core", "width_core", "in_core"), "tucker": ("out_core", "core", "in_core")}


class TensorizedConv2d(Convolution):
    r"""A convolution whose kernel is held as the cores of a tensor decomposition; see :mod:`hf_fnl.math.tensors`.

    - ``"tt"``: applied as 1-by-1, a row ``1 x kw``, a column ``kh x 1`` and 1-by-1, with at most ``rank`` channels
      between.
    - ``"tucker"``: applied as 1-by-1, ``kh x kw`` and 1-by-1.

    Where that takes fewer operations on an input, the kernel is multiplied out and applied at once.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width, or one number for both.
        rank: Largest bond between cores; bonds that cannot be as wide are as wide as they can be.
        stride: As in :class:`torch.nn.Conv2d`, like all options up to ``padding_mode``.
        groups: Only 1 is allowed.
        scheme: ``"tt"`` or ``"tucker"``.
        compose: Whether the kernel is multiplied out in the forward pass; ``None`` chooses by the operations.
        init: ``"spectral"`` decomposes a kernel drawn as :class:`torch.nn.Conv2d` does into cores of the same norm,
            ``"default"`` draws each core as the kernel of its convolution (Khodak et al. 2021, Sec. 4), ``"he"`` by
            the rule of He et al. 2015 on the fan-in of that kernel.

    Raises:
        ImportError: If a kernel is to be decomposed and TensorLy is not installed.
        ValueError: If an option is not allowed.
    """

    kind = "tensor"
    shape: KernelShape

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
        scheme: str = "tt",
        compose: bool | None = None,
        init: str = "spectral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups != 1:
            raise ValueError(f"a tensorized convolution needs groups=1, got {groups}")
        if init == "spectral_ones":
            raise ValueError(
                "a tensor has no singular values: init must be spectral, default or he, got 'spectral_ones'"
            )
        super().__init__(rank, init=init)
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self.take_options_(nn.Conv2d(*sizes, device="meta"))  # type: ignore[arg-type]  # torch's own checks and defaults
        self.shape, self.scheme, self.compose = self.dense_shape, scheme, compose
        check_rank(rank, self.largest_rank(self.shape, scheme))
        for name, shape in zip(_CORES[scheme], core_shapes(self.shape, rank, scheme), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.add_bias_(out_channels if bias else None)
        self.reset_parameters()

    @staticmethod
    def largest_rank(kernel_shape: Shape, scheme: str) -> int:
        """The rank at which every kernel ``(out, in, kh, kw)`` of a shape is held exactly, and the largest allowed."""
        return max(largest_bonds(kernel_shape, scheme))

    @staticmethod
    def parameter_count(kernel_shape: Shape, rank: int, scheme: str) -> int:
        """Parameters of the cores of a kernel ``(out, in, kh, kw)`` of a shape."""
        return sum(map(math.prod, core_shapes(kernel_shape, rank, scheme)))

    def factors(self) -> tuple[Tensor, ...]:
        """The cores, from that of the output channels to that of the input channels."""
        return tuple(getattr(self, name) for name in _CORES[self.scheme])

    def weight_from(self, *factors: Tensor) -> Tensor:
        """The dense kernel."""
        return product(*factors)

    def chain(self, *factors: Tensor) -> tuple[Tensor, ...]:
        """Cores as kernels of convolutions, from that of the input channels to that of the output channels; views."""
        left, *middle, right = factors
        if self.scheme == "tucker":
            return right.mT[..., None, None], *middle, left[..., None, None]
        column, row = (core.transpose(1, 2) for core in middle)
        return right[..., None, None], row.unsqueeze(2), column.unsqueeze(3), left[..., None, None]

    def composing_cost(self) -> int:
        """Multiplications that it takes to multiply the cores out."""
        return product_cost(*(core.shape for core in self.factors()))

    def split(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The cores of a kernel; on the meta device only their shapes."""
        return self.factors() if weight.is_meta else decompose(weight, self.rank, self.scheme)
