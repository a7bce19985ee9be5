"""Depthwise over-parametrized convolutions (Cao et al. 2020, DO-Conv)."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class DepthwiseOverparametrization(nn.Module):
    r"""Parametrization of a kernel by products, channel by channel of the input: ``K_oi = (I + D_i) W_oi``.

    ``K_oi`` and ``W_oi`` are the ``kh * kw`` points of the filter from channel ``i`` to channel ``o`` as a vector, and
    ``D_i`` is a matrix that all filters on one channel share. It is held as an offset from the identity and starts
    at zero, as in the authors' code: the kernel is at first what it was, and decay pulls it back there.

    Args:
        groups: Groups of the convolution.
        kernel_size: Its height ``kh`` and width ``kw``.
    """

    def __init__(self, groups: int, kernel_size: tuple[int, ...]) -> None:
        super().__init__()
        self.groups, self.kernel_size = groups, kernel_size

    def forward(self, W: Tensor, D: Tensor) -> Tensor:
        """Return the kernel ``(out, in / groups, kh, kw)`` of ``W (out, in / groups, kh * kw)`` and ``D``.

        ``D`` has shape ``(in, kh * kw, kh * kw)``.
        """
        by_group = W.unflatten(0, (self.groups, -1)), D.unflatten(0, (self.groups, -1))
        offset = torch.einsum("gois,gims->goim", *by_group).flatten(0, 1)
        return (W + offset).unflatten(2, self.kernel_size)

    def right_inverse(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``W`` and ``D`` of a kernel, with ``D`` at zero."""
        points = math.prod(self.kernel_size)
        return kernel.flatten(2), kernel.new_zeros(self.groups * kernel.shape[1], points, points)


def over_parametrize_(model: nn.Module, *, include: Collection[str] | None = None) -> list[str]:
    """Over-parametrize the kernels of convolutions depthwise for training, in place; outputs stay as they are.

    The ``weight`` of each becomes a parametrization with two parameters in the place of one, so build the optimizer
    afterwards. To go on from a checkpoint of such a model, over-parametrize the new model first.

    Args:
        model: Any module.
        include: Names of the convolutions to choose from, of which those with a kernel larger than 1 x 1 are taken;
            all by default.

    Returns:
        Names of these convolutions.

    Raises:
        ValueError: If there is none.
    """
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and math.prod(module.kernel_size) > 1 and (include is None or name in include)
    }
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no convolutions with a kernel larger than 1 x 1")
    for conv in chosen.values():
        parametrize.register_parametrization(
            conv, "weight", DepthwiseOverparametrization(conv.groups, conv.kernel_size)
        )
    return list(chosen)


@torch.enable_grad()  # without gradients torch would make buffers of the kernels
def merge_do_conv_(model: nn.Module) -> list[str]:
    """Multiply over-parametrized kernels out, in place: plain convolutions with the same outputs.

    Returns:
        Names of the convolutions that are plain now.

    Raises:
        ValueError: If there is none.
    """
    merged = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and parametrize.is_parametrized(module, "weight")
    ]
    if not merged:
        raise ValueError(f"{type(model).__name__} has no over-parametrized convolution; see over_parametrize_")
    for name in merged:
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    return merged
