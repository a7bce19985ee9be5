"""Gradients and steps of named parameters, for tests of LAMB."""

from __future__ import annotations

import torch
from torch import nn


def set_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter], seeds: range) -> None:
    for seed in seeds:
        set_gradients(named, seed)
        optimizer.step()


def assert_same(named: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> None:
    for name, parameter in named.items():
        assert torch.equal(parameter, other[name]), name
