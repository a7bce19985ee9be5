"""What a machine can do at most, measured: its limits stand beside what was reached."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from benchmarks.harness.timing import interleave
from hf_fnl.planning import flop_counter

_WIDTHS = {"cpu": (512, 1024), "cuda": (4096, 8192)}  # of square matrices
_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes: far more than any cache holds
_ROUNDS = 7


@lru_cache
def matrix_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of the fastest product of two square matrices, a multiplication and an addition each."""
    rates = []
    for width in _WIDTHS[torch.device(device).type]:
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        seconds = interleave({"product": lambda a=a, b=b: a @ b}, device, rounds=_ROUNDS)["product"]
        rates.append(2 * width**3 / min(seconds))
    return max(rates)


@lru_cache
def copy_rate(device: str) -> float:
    """Bytes a second that a copy of a large tensor reads and writes."""
    source = torch.randn(_COPIED[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, device, rounds=_ROUNDS)["copy"]
    return 2 * source.nbytes / min(seconds)


def count_flops(step: Callable[[], object]) -> int:
    """Operations of the matrix products and convolutions in a step.

    Fused attention is counted only as far as torch knows its kernel: on a CPU let a model run with
    ``model.set_attn_implementation("eager")``.
    """
    with flop_counter() as counter:
        step()
    return counter.get_total_flops()
