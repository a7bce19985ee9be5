"""A convolution that keeps nothing for the backward pass but its input and its factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Makes from an input and factors the input and the kernel of the last convolution.
Prepare = Callable[..., tuple[Tensor, Tensor]]
Options = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups


class RecomputingConvolution(torch.autograd.Function):
    """``conv2d(*prepare(x, *factors), bias)``, where the backward pass prepares once more instead of keeping."""

    @staticmethod
    def forward(
        ctx: Any, prepare: Prepare, options: Options, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        """Prepare and convolve; what was prepared is let go."""
        ctx.prepare, ctx.options = prepare, options
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.autocast = _autocast_as_now(x)
        ctx.save_for_backward(x, *factors)
        x, kernel = prepare(x, *factors)
        return F.conv2d(x, kernel, bias, *options)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Prepare again, then pass the gradient back through the last convolution and through what came before."""
        (gradient,) = gradients
        again = torch.is_grad_enabled()  # whether these gradients are to be differentiated themselves
        with torch.enable_grad(), ctx.autocast():
            # Not themselves, for they may have hooks; `view_as` would change the strides of axes of length 1.
            inputs = [tensor[...] for tensor in ctx.saved_tensors]
            x, kernel = (tensor.to(gradient.dtype) for tensor in ctx.prepare(*inputs))
        stride, padding, dilation, groups = ctx.options
        of_input, of_kernel, of_bias = torch.ops.aten.convolution_backward(
            gradient,
            x,
            kernel,
            ctx.bias_sizes,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [x.requires_grad, kernel.requires_grad, ctx.needs_input_grad[3]],
        )
        followed = [(x, of_input), (kernel, of_kernel)] if x.requires_grad else [(kernel, of_kernel)]
        outputs, given = zip(*followed, strict=True)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, given, create_graph=again))
        of_x, *of_factors = (next(found) if tensor.requires_grad else None for tensor in inputs)
        return None, None, of_x, of_bias, *of_factors


def _autocast_as_now(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """What enters, once more, the automatic casts that are on now."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, dtype, enabled)
