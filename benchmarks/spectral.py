"""Spectral initialization against a full SVD: the feed-forward matrices of BERT-base and its word embedding.

python -m benchmarks.spectral [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleave, parse, write
from hf_fnl.spectral import spectral_init

INITIALIZER_RANGE = 0.02  # of BERT's normal initialization
EXCESS_TOLERANCE = 1e-5  # relative to the norm of the weight; float32 holds 7 digits
OURS, EXACT, SKETCH = "hf_fnl.spectral_init", "torch.linalg.svd", "torch.svd_lowrank (inexact)"

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Workload:
    """Weights of one shape to be split at one rank, and how many times faster than the full SVD that should be."""

    name: str
    count: int
    shape: tuple[int, int]
    rank: int
    goal: float

    def weights(self, device: str) -> list[Tensor]:
        """Weights as BERT draws them, the same on every call."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(self.count, *self.shape, generator=generator) * INITIALIZER_RANGE
        return list(drawn.to(device))


def workloads(quick: bool) -> list[Workload]:
    """BERT-base's 24 feed-forward matrices and its embedding, or a fraction of them."""
    count, vocabulary = (2, 5000) if quick else (24, 30522)
    return [
        Workload(f"{count} feed-forward matrices", count, (768, 3072), 192, 10.0),
        Workload("word embedding", 1, (vocabulary, 768), 128, 5.0),
    ]


def svd_init(weight: Tensor, rank: int) -> Factors:
    """Balanced factors from a full SVD."""
    P, S, Qt = torch.linalg.svd(weight, full_matrices=False)
    root = S[:rank].sqrt()
    return P[:, :rank] * root, Qt[:rank].mT * root


def lowrank_init(weight: Tensor, rank: int) -> Factors:
    """Balanced factors from PyTorch's randomized SVD, which does not reach the best approximation."""
    P, S, Q = torch.svd_lowrank(weight, rank)
    return P * S.sqrt(), Q * S.sqrt()


METHODS: dict[str, Callable[[Tensor, int], Factors]] = {OURS: spectral_init, EXACT: svd_init, SKETCH: lowrank_init}


def excess_error(weight: Tensor, rank: int, method: Callable[[Tensor, int], Factors]) -> float:
    """How much further ``U V^T`` is from the weight than the best approximation is, relative to the weight's norm."""
    weight64 = weight.double()
    U, V = (factor.double() for factor in method(weight, rank))
    best = torch.linalg.svdvals(weight64)[rank:].norm()
    return float(((weight64 - U @ V.mT).norm() - best) / weight64.norm())


def measure(workload: Workload, device: str, rounds: int) -> list[dict[str, Any]]:
    """Check every method on the first weight of a workload, then time it on all.

    Raises:
        RuntimeError: If a method that claims to be exact is not; nothing is timed then.
    """
    weights = workload.weights(device)
    errors = {name: excess_error(weights[0], workload.rank, method) for name, method in METHODS.items()}
    for name in (OURS, EXACT):
        if not errors[name] < EXCESS_TOLERANCE:
            raise RuntimeError(f"{name} misses the best approximation by {errors[name]:.1e} on {workload.name}")

    def case(method: Callable[[Tensor, int], Factors]) -> Callable[[], object]:
        return lambda: [method(weight, workload.rank) for weight in weights]

    seconds = interleave({name: case(method) for name, method in METHODS.items()}, rounds=rounds, warmup=1)
    return [
        {
            "workload": workload.name,
            "shape": "x".join(map(str, workload.shape)),
            "rank": workload.rank,
            "method": name,
            "excess_error": errors[name],
            "seconds": median(seconds[name]),
            "speedup_over_svd": median(a / b for a, b in zip(seconds[EXACT], seconds[name], strict=True)),
            "goal": workload.goal if name == OURS else None,
        }
        for name in METHODS
    ]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, measure, write; returns the rows."""
    args = parse("spectral", __doc__, "two matrices and a small vocabulary, three rounds", argv)
    rounds = 3 if args.quick else 5
    rows = [row for workload in workloads(args.quick) for row in measure(workload, args.device, rounds)]
    write("spectral", args.device, rows, args.command, args.out)
    return rows


if __name__ == "__main__":
    main()
