"""Convolutions with every option, and what the tests of factorized convolutions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_fnl.layers import FactorizedConv2d, TensorizedConv2d
from hf_fnl.layers.conv import kernel_matrix
from hf_fnl.layers.conv_base import Convolution
from hf_fnl.surgery.config import CONV_SCHEMES, TENSOR_SCHEMES

DOUBLE = {"dtype": torch.float64}

SCHEMES = (*CONV_SCHEMES, *TENSOR_SCHEMES)
LAYERS = dict.fromkeys(CONV_SCHEMES, FactorizedConv2d) | dict.fromkeys(TENSOR_SCHEMES, TensorizedConv2d)
ONLY_OF_MATRICES = {"groups", "deep", "overcomplete"}

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
    "groups": {"groups": 2, "padding": (1, 2)},
    "groups-reflected": {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2), "groups": 2},
}


SOME_OPTIONS = {name: OPTIONS[name] for name in ("all", "same-dilated", "reflect", "without-bias", "groups")}


def with_each_scheme(**tables: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    """Parametrize by ``scheme`` and by each entry of the first table, paired with one of each other in turn.

    Without what a scheme does not have.
    """
    cases = []
    for number, scheme in enumerate(SCHEMES):
        fitting = [
            [n for n in table if scheme in CONV_SCHEMES or ONLY_OF_MATRICES.isdisjoint(table[n])]
            for table in tables.values()
        ]
        for place, first in enumerate(fitting[0]):
            names = [first, *(others[(place + number) % len(others)] for others in fitting[1:])]
            options = [table[name] for table, name in zip(tables.values(), names, strict=True)]
            cases.append(pytest.param(scheme, *options, id="-".join([scheme, *names])))
    return pytest.mark.parametrize(("scheme", *tables), cases)


def convolution(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(6, 10, (3, 5), **options, **DOUBLE)


def full_rank(shape: Sequence[int], scheme: str) -> int:
    """The rank at which kernels of a shape are held exactly."""
    if scheme in TENSOR_SCHEMES:
        return TensorizedConv2d.largest_rank(shape, scheme)
    return min(kernel_matrix(torch.empty(shape), scheme).shape)


def factorized(scheme: str, *sizes: Any, **options: Any) -> Convolution:
    return LAYERS[scheme](*sizes, scheme=scheme, **options)


def from_dense(dense: nn.Conv2d, scheme: str, rank: int | None = None, **options: Any) -> Convolution:
    """At full rank unless given."""
    rank = full_rank(dense.weight.shape, scheme) if rank is None else rank
    return LAYERS[scheme].from_dense(dense, rank, scheme=scheme, **options)


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 6, 13, 11)), **DOUBLE)


def randomized(layer: nn.Module) -> nn.Module:
    """Away from the initial values, where M is the identity."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def outputs_and_gradients(layer: nn.Module, x: Tensor, target: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()  # a copy would have a layout of its own
    y = layer(x)
    return [y, *torch.autograd.grad((y * target).sum(), [x, *layer.parameters()])]


def training_flops(layer: nn.Module, x: Tensor) -> int:
    """Floating-point operations of a forward and a backward pass, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        layer(x.clone().requires_grad_()).sum().backward()
    return counter.get_total_flops()


class Convolutions(TorchDispatchMode):
    """Records the inputs and the kernels that convolutions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append(args[:2])
        return func(*args, **(kwargs or {}))


def paths_taken(make: Callable[[int], Convolution], ranks: Sequence[int], shape: tuple[int, ...]) -> list[bool]:
    """For layers of some ranks, whether they multiply their kernel out; checks that nothing else is cheaper."""
    x, composes = torch.randn(shape), []
    for rank in ranks:
        layer, flops = make(rank), {}
        for layer.compose in (True, False):
            flops[layer.compose] = training_flops(layer, x)
        layer.compose = None
        with Convolutions() as convolutions:
            layer(x)
        composes.append(len(convolutions.seen) == 1)
        assert flops[composes[-1]] == min(flops.values())
    return composes


def poison(module: nn.Module) -> None:
    nn.init.constant_(module.weight, torch.nan)
