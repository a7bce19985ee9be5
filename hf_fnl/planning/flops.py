"""Operations of a training step of a given model on a given batch, and how many a device can do."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hf_fnl.layers.whole import whole_shape
from hf_fnl.planning.facts import OnGPU, give_storage

_WIDTHS = {"cuda": (4096, 8192)}
_CPU_WIDTHS = (512, 1024)
_REPEATS = 5


@dataclass(frozen=True)
class StepFlops:
    """Operations of the products of matrices and convolutions in a step.

    Args:
        forward: Of the forward pass; those of a fused loss include its gradients.
        backward: Of the backward pass, in which nothing is computed again.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of both passes."""
        return self.forward + self.backward


def structure_of(model: nn.Module) -> Any:
    """A copy of a model whose parameters and buffers have shapes and no values, for :func:`step_flops`."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        empty = torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    twin = copy.deepcopy(model, memo)
    vars(twin).pop("forward", None)  # accelerate's, which calls the original's
    return twin


def step_flops(structure: Any, inputs: Mapping[str, Tensor]) -> StepFlops:
    """Count the operations of a step by running it on tensors without values.

    Args:
        structure: From :func:`structure_of`, or a model on ``meta``; not to be used afterwards.
        inputs: What the model is called with, its labels among it; only shapes and types are read, and which share of
            the labels is not -100.
    """
    share = _labelled_share(inputs.get("labels"))
    for module in structure.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_storage(structure)
        structure.train()
        empty = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in inputs.items()}
        with OnGPU(share), FlopCounterMode(display=False) as forward:
            loss = structure(**empty).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return StepFlops(forward.get_total_flops(), backward.get_total_flops())


def _labelled_share(labels: Tensor | None) -> float:
    if labels is None or not labels.numel():
        return 1.0
    return max((labels != -100).float().mean().item(), 1 / labels.numel())


@lru_cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a device reaches in the fastest product of two square matrices, measured."""
    rates = []
    for width in _WIDTHS.get(device.type, _CPU_WIDTHS):
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        rates += [2 * width**3 / _seconds(a, b) for _ in range(_REPEATS)]
    return max(rates)


def _seconds(a: Tensor, b: Tensor) -> float:
    def wait() -> None:
        if a.is_cuda:
            torch.cuda.synchronize(a.device)

    torch.matmul(a, b)
    wait()
    start = time.perf_counter()
    torch.matmul(a, b)
    wait()
    return time.perf_counter() - start
