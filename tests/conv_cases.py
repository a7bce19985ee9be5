"""Convolutions with every option, and what the tests of factorized convolutions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

DOUBLE = {"dtype": torch.float64}

# Options of a convolution from 6 channels to 10 with a kernel of 3 by 5.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": (2, 3)},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": (3, 2), "padding": 2},
    "all": {"stride": (2, 1), "padding": (3, 1), "dilation": (1, 2)},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid", "stride": 2},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2)},
    "replicate": {"padding": (1, 3), "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "without-bias": {"bias": False},
}


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 6, 13, 11)), **DOUBLE)


def randomized(layer: nn.Module) -> nn.Module:
    """Away from the initial values, where M is the identity."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def outputs_and_gradients(layer: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad((y * target).sum(), [x, *layer.parameters()])]


def training_flops(layer: nn.Module, x: Tensor) -> int:
    """Floating-point operations of a forward and a backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        layer(x.clone().requires_grad_()).sum().backward()
    return counter.get_total_flops()


def paths_taken(make: Callable[[int], nn.Module], ranks: Sequence[int], shape: tuple[int, ...]) -> list[bool]:
    """For layers of some ranks, whether they multiply their kernel out; checks that nothing else is cheaper."""
    x, composes = torch.randn(shape), []
    for rank in ranks:
        layer, flops = make(rank), {}
        for layer.compose in (True, False, None):
            flops[layer.compose] = training_flops(layer, x)
        assert flops[None] == min(flops[True], flops[False])
        composes.append(flops[None] == flops[True])
    return composes


class Convolutions(TorchDispatchMode):
    """Records the inputs and the kernels that convolutions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[:2])
        return func(*args, **(kwargs or {}))


def poison(module: nn.Module) -> None:
    nn.init.constant_(module.weight, torch.nan)
