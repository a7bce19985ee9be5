"""What a machine can do at most, measured: its limits stand beside what was reached."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.house.timing import interleave
from hf_fnl.planning import flops  # which also lets torch count the products that are added in place

_COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes: far more than any cache holds
_ROUNDS = 7


def matrix_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of the fastest product of two square matrices, a multiplication and an addition each."""
    return flops.matrix_rate(torch.device(device), dtype)


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
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
