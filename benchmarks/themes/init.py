"""Spectral initialization: matrices against a full SVD, and whole models against their stock classes.

The limit is that of the exact way by operations: half of a Gram matrix, its tridiagonal form, the eigenvectors that are
kept and what they give on the other side, at the rate of a product of matrices. Most of the tridiagonal form is
products of a matrix and a vector, which no machine runs at that rate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from benchmarks.harness.limits import matrix_rate
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Case, Comparison, Goal, Row, interleave
from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining
from hf_fnl.math.spectral import spectral_init
from hf_fnl.math.truncation import HeadWeights, truncate_ov

INITIALIZER_RANGE = 0.02  # of BERT's normal initialization
EXCESS_TOLERANCE = 1e-5  # relative to the norm of the weight; float32 holds 7 digits
BERT_LARGE_SECONDS = 2.0  # on a GPU
OURS, EXACT, SKETCH, ARNOLDI = "hf_fnl", "torch.linalg.svd", "torch.svd_lowrank (inexact)", "scipy svds"
STOCK, FACTORIZED = "stock class", "factorized class"

Factors = tuple[Tensor, Tensor]
Method = Callable[[Tensor, int], Factors]


@dataclass(frozen=True)
class Workload:
    """Weights of one shape to be split at one rank, and how many times faster than the full SVD that should be."""

    name: str
    count: int
    shape: tuple[int, int]
    rank: int
    goal: float

    def weights(self, device: str) -> list[Tensor]:
        """Weights as BERT draws them."""
        return list(torch.randn(self.count, *self.shape, device=device) * INITIALIZER_RANGE)


def workloads(options: Options) -> list[Workload]:
    """BERT-base's 24 feed-forward matrices and its embedding, or a fraction of them."""
    count = options.pick(full=24, quick=2, tiny=2)
    hidden = options.pick(full=768, quick=768, tiny=48)
    vocabulary = options.pick(full=30522, quick=5000, tiny=301)
    return [
        Workload(f"{count} feed-forward matrices", count, (hidden, 4 * hidden), hidden // 4, 10.0),
        Workload("word embedding", 1, (vocabulary, hidden), hidden // 6, 5.0),
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


def arnoldi_init(weight: Tensor, rank: int) -> Factors:
    """Balanced factors from SciPy's Krylov method, which suits few of many triples."""
    from scipy.sparse.linalg import svds

    P, S, Qt = (torch.from_numpy(part.copy()) for part in svds(weight.numpy(), k=rank))
    return P * S.sqrt(), Qt.mT * S.sqrt()


def excess_error(weight: Tensor, rank: int, method: Method) -> float:
    """How much further ``U V^T`` is from the weight than the best approximation is, relative to the weight's norm."""
    weight64 = weight.double()
    U, V = (factor.double() for factor in method(weight, rank))
    gram = weight64.mT @ weight64 if weight.shape[0] > weight.shape[1] else weight64 @ weight64.mT
    best = torch.linalg.eigvalsh(gram)[:-rank].clamp(min=0).sum().sqrt()  # of the energies that are cut off
    return float(((weight64 - U @ V.mT).norm() - best) / weight64.norm())


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` if a method that claims to be exact is not."""
    for workload in workloads(options):
        weight = workload.weights(options.device)[0]
        for name, method in ((OURS, spectral_init), (EXACT, svd_init)):
            if not (error := excess_error(weight, workload.rank, method)) < EXCESS_TOLERANCE:
                raise RuntimeError(f"{name} misses the best approximation by {error:.1e} on {workload.name}")
    left, right = _heads(options)
    rank = left.shape[-1] // 2
    U, V = _cut_heads(left, right, rank)
    for head in range(len(left)):
        found = (U[head], V[head])
        if not (error := excess_error(left[head] @ right[head].mT, rank, lambda *_: found)) < EXCESS_TOLERANCE:  # noqa: B023
            raise RuntimeError(f"the product of head {head} misses its best approximation by {error:.1e}")


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _cut_heads(left: Tensor, right: Tensor, rank: int) -> Factors:
    cut = truncate_ov(HeadWeights(left, None), HeadWeights(right, None), rank)
    return cut[0].weight, cut[1].weight


def _heads(options: Options) -> Factors:
    """Query and key of the heads of a layer of BERT-base, each ``(heads, hidden, hidden / heads)``."""
    hidden = options.pick(full=768, quick=768, tiny=48)
    weights = torch.randn(2, hidden, hidden, device=options.device) * INITIALIZER_RANGE
    left, right = (weight.unflatten(0, (12, -1)).mT for weight in weights)
    return left, right


def measure(options: Options) -> Iterator[Row]:
    """Matrices, heads, and models made from their configurations."""
    rounds = 2 if options.on_gpu else options.pick(full=5, quick=3, tiny=2)  # a full SVD is slow on a GPU
    for workload in workloads(options):
        yield from _matrices(workload, options, rounds)
    yield from _krylov(workloads(options)[0], options)
    yield from _heads_of_a_layer(options, rounds)
    yield from _models(options)


def _matrices(workload: Workload, options: Options, rounds: int) -> list[Row]:
    weights, rank = workload.weights(options.device), workload.rank

    def one_by_one(method: Method) -> Case:
        return lambda: [method(weight, rank) for weight in weights]

    cases: dict[str, Case] = {
        OURS: one_by_one(spectral_init),
        EXACT: one_by_one(svd_init),
        SKETCH: one_by_one(lowrank_init),
    }
    exact = min(interleave({EXACT: cases[EXACT]}, options.device, rounds=1, warmup=1)[EXACT])
    least = len(weights) * least_seconds(workload.shape, rank, options.device)
    return Comparison(
        f"{workload.name}, {_size(workload.shape)}, rank {rank}",
        cases,
        against=EXACT,
        limits={OURS: exact / least},
        goals={OURS: Goal(EXACT, faster=workload.goal)},
        facts={
            OURS: {"excess_error": excess_error(weights[0], rank, spectral_init)},
            EXACT: {"excess_error": excess_error(weights[0], rank, svd_init)},
            SKETCH: {"excess_error": excess_error(weights[0], rank, lowrank_init)},
        },
    ).measure(options.device, rounds=rounds, warmup=1)


def _krylov(workload: Workload, options: Options) -> list[Row]:
    """One feed-forward matrix by SciPy's method, which is too slow for all of them."""
    name = f"one matrix, {_size(workload.shape)}, rank {workload.rank}"
    if options.on_gpu or importlib.util.find_spec("scipy") is None:
        reason = "runs on a CPU only" if options.on_gpu else "scipy is not installed"
        return [{"workload": name, "case": ARNOLDI, "not_measured": reason}]
    weight = workload.weights(options.device)[0]
    cases = {OURS: spectral_init, EXACT: svd_init, ARNOLDI: arnoldi_init}
    return Comparison(
        name, {case: partial(method, weight, workload.rank) for case, method in cases.items()}, against=EXACT
    ).measure(options.device, rounds=2, warmup=1)


def _heads_of_a_layer(options: Options, rounds: int) -> list[Row]:
    left, right = _heads(options)
    rank = left.shape[-1] // 2
    cases: dict[str, Case] = {
        OURS: lambda: _cut_heads(left, right, rank),
        "QR and SVD of a core": lambda: _heads_by_qr(left, right, rank),
    }
    name = f"query and key of {len(left)} heads, {_size(left.shape[1:])}, rank {rank}"
    return Comparison(name, cases, against="QR and SVD of a core").measure(options.device, rounds=rounds)


def _heads_by_qr(left: Tensor, right: Tensor, rank: int) -> Factors:
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right)
    P, S, Qt = torch.linalg.svd(left_core @ right_core.mT)
    root = S[..., :rank].sqrt().unsqueeze(-2)
    return left_basis @ P[..., :rank] * root, right_basis @ Qt.mT[..., :rank] * root


def _models(options: Options) -> Iterator[Row]:
    """Models from their configurations; both classes draw as many random numbers."""
    sizes = options.pick(
        full={"BERT-base": (768, 12), "BERT-large": (1024, 24)},
        quick={"BERT-base, 2 layers": (768, 2)},
        tiny={"BERT, 2 layers of 48": (48, 2)},
    )
    for name, (hidden, layers) in sizes.items():
        cases = {STOCK: partial(stock_model, hidden, layers, options), FACTORIZED: _factorized(hidden, layers, options)}
        comparison = Comparison(f"{name} from its configuration", cases, against=STOCK)
        rows = comparison.measure(options.device, rounds=options.pick(full=3, quick=3, tiny=2), warmup=1)
        if options.on_gpu and name == "BERT-large":
            reached = rows[-1]["milliseconds"] <= 1e3 * BERT_LARGE_SECONDS
            rows[-1] |= {"goal": f"at most {BERT_LARGE_SECONDS:g} s", "reached": reached}
        yield from rows


def stock_model(hidden: int, layers: int, options: Options) -> torch.nn.Module:
    """A stock BERT on the device."""
    with torch.device(options.device):
        return BertForPreTraining(BertConfig(**_bert(hidden, layers, options)))


def factorized_model(hidden: int, layers: int, options: Options) -> torch.nn.Module:
    """The same with heads of half their rank and feed-forward matrices of a quarter."""
    rank = hidden // _head_count(hidden) // 2
    config = FactorizedBertConfig(**_bert(hidden, layers, options), qk_rank=rank, ov_rank=rank, ffn_rank=hidden // 4)
    with torch.device(options.device):
        return FactorizedBertForPreTraining(config)


def _factorized(hidden: int, layers: int, options: Options) -> Case:
    return partial(factorized_model, hidden, layers, options)


def _bert(hidden: int, layers: int, options: Options) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": _head_count(hidden),
        "intermediate_size": 4 * hidden,
        "vocab_size": options.pick(full=30522, quick=30522, tiny=301),
    }


def _head_count(hidden: int) -> int:
    return max(hidden // 64, 3)


def least_seconds(shape: tuple[int, int], rank: int, device: str) -> float:
    """Seconds that the exact way takes at least by its operations."""
    m, n = sorted(shape)
    operations = m**2 * n + 4 / 3 * m**3 + 2 * m**2 * rank + 2 * m * n * rank
    return operations / matrix_rate(device)


THEME = Theme("init", check, measure)
