"""Ranks for many products at once: one scale, a share of parameters or energy, or a budget that spectra share out."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fnl.config import RankRule
from hf_fnl.spectral import check_rank

Ranks = dict[str, int | None]

TOLERANCE = 0.01  # of a ratio that is asked for


@dataclass(frozen=True)
class Candidate:
    """A product whose rank is to be chosen, or several that share one rank, as the heads of an attention do.

    Args:
        name: What it is called in errors and in the result; unique.
        limit: Its largest rank.
        count: Parameters of its factors at a rank: ``rank * (m + n)`` for a matrix of shape ``(m, n)``.
        dense: Parameters of what it replaces: ``m * n``.
        energies: Squared singular values ``(limit,)``, descending; called only where the rule needs them.
        full: The rank that a rank scale of 1 stands for; ``limit`` unless given.
    """

    name: str
    limit: int
    count: Callable[[int], int]
    dense: int
    energies: Callable[[], Tensor]
    full: int | None = None

    def cost(self, rank: int) -> int:
        """Parameters at this rank; factors that would hold more than the matrix are not made."""
        return min(self.count(rank), self.dense)

    def scaled(self, scale: float, multiple_of: int) -> int:
        """The rank that a rank scale comes to."""
        return self.round(scale * (self.limit if self.full is None else self.full), multiple_of)

    def raised(self, rank: int, multiple_of: int) -> int:
        """The next rank that is allowed: a multiple, or the limit."""
        return min(rank + multiple_of, self.limit)

    def round(self, rank: float, multiple_of: int) -> int:
        """The nearest rank that is a multiple, or the limit; a rank in the middle goes up."""
        below = int(rank // multiple_of) * multiple_of
        above = self.raised(below, multiple_of)
        return below if below > 0 and rank - below < above - rank else above

    def shares(self) -> Tensor:
        """Shares of ``||W||_F^2`` that the first 1, 2, ... singular values hold ``(limit,)``; ones if it is zero."""
        cumulated = self.energies().double().cumsum(0)
        return cumulated / cumulated[-1] if cumulated[-1] > 0 else torch.ones_like(cumulated)

    def kept(self, rank: int) -> int | None:
        """``None`` where the factors would hold as many parameters as the matrix."""
        return rank if self.count(rank) < self.dense else None


def choose_ranks(candidates: Sequence[Candidate], rule: RankRule) -> Ranks:
    """Choose a rank for every candidate.

    Args:
        candidates: What is to be factorized.
        rule: How; see :class:`~hf_fnl.config.RankRule`.

    Returns:
        The rank of each candidate by name, ``None`` where it is to stay dense.

    Raises:
        ValueError: If ``rule.rank`` is above the largest rank of a candidate, a ratio cannot be met within 1 % of it
            or a budget not be kept, or every candidate would stay dense.
    """
    if rule.rank is not None:
        for candidate in candidates:
            check_rank(rule.rank, candidate.limit, f"rank of {candidate.name}")
        return {candidate.name: candidate.round(rule.rank, rule.multiple_of) for candidate in candidates}
    if rule.rank_scale is not None:
        return {c.name: c.scaled(rule.rank_scale, rule.multiple_of) for c in candidates}
    if rule.energy is not None:
        chosen = {c.name: _rank_for_energy(c, rule.energy, rule.multiple_of) for c in candidates}
    elif rule.ratio is not None:
        chosen = _ranks_for_ratio(candidates, rule.ratio, rule.multiple_of)
    else:
        assert rule.budget is not None
        chosen = _ranks_for_budget(candidates, rule.budget, rule.multiple_of)
    ranks = {candidate.name: candidate.kept(chosen[candidate.name]) for candidate in candidates}
    if all(rank is None for rank in ranks.values()):
        raise ValueError(f"{rule} leaves every matrix dense: factors would hold as many parameters; ask for less")
    return ranks


def _rank_for_energy(candidate: Candidate, share: float, multiple_of: int) -> int:
    """The smallest rank that keeps a share of the energy, rounded up."""
    needed = int((candidate.shares() < share).sum()) + 1
    return min(math.ceil(needed / multiple_of) * multiple_of, candidate.limit)


def _ranks_for_ratio(candidates: Sequence[Candidate], ratio: float, multiple_of: int) -> dict[str, int]:
    """The ranks of the largest scale that does not exceed the ratio; what rounding left over is then given out."""
    target = ratio * _dense(candidates)

    def at(scale: float) -> dict[str, int]:
        return {c.name: c.scaled(scale, multiple_of) for c in candidates}

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(candidates, at(middle)) <= target else (low, middle)
    ranks = _fill(candidates, at(low), ratio, multiple_of, lambda candidate, rank: rank / candidate.limit)
    reached = _total(candidates, ranks) / _dense(candidates)
    if abs(reached - ratio) > TOLERANCE * ratio:
        raise ValueError(
            f"a ratio of {ratio:.4g} of the matrices cannot be met within {TOLERANCE:.0%} by ranks that are multiples "
            f"of {multiple_of}, which come to {reached:.4g}; lower multiple_of or change the ratio"
        )
    return ranks


def _ranks_for_budget(candidates: Sequence[Candidate], budget: float, multiple_of: int) -> dict[str, int]:
    """Give every next unit of rank to the product where it keeps the largest share of energy per parameter."""
    shares = {candidate.name: candidate.shares().tolist() for candidate in candidates}

    def negative_gain(candidate: Candidate, rank: int) -> float:
        raised, kept = candidate.raised(rank, multiple_of), shares[candidate.name]
        return (kept[rank - 1] - kept[raised - 1]) / (candidate.count(raised) - candidate.count(rank))

    smallest = {candidate.name: candidate.raised(0, multiple_of) for candidate in candidates}
    least = _total(candidates, smallest) / _dense(candidates)
    if least > budget:
        raise ValueError(
            f"the smallest ranks that are multiples of {multiple_of} need {least:.4g} of the parameters, and the "
            f"budget is {budget:.4g}; lower multiple_of or raise the budget"
        )
    return _fill(candidates, smallest, budget, multiple_of, negative_gain)


def _fill(
    candidates: Sequence[Candidate],
    ranks: Mapping[str, int],
    share: float,
    multiple_of: int,
    priority: Callable[[Candidate, int], float],
) -> dict[str, int]:
    """Raise ranks step by step, lowest priority value first, as far as a share of the parameters allows."""
    chosen, total, target = dict(ranks), _total(candidates, ranks), share * _dense(candidates)
    by_name = {candidate.name: candidate for candidate in candidates}
    # Names decide between equals, so that the order of the candidates does not.
    queue = [(priority(c, chosen[c.name]), c.name) for c in candidates if chosen[c.name] < c.limit]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        candidate, rank = by_name[name], chosen[name]
        raised = candidate.raised(rank, multiple_of)
        more = candidate.cost(raised) - candidate.cost(rank)
        if total + more > target:
            continue
        chosen[name], total = raised, total + more
        if raised < candidate.limit:
            heapq.heappush(queue, (priority(candidate, raised), name))
    return chosen


def _total(candidates: Sequence[Candidate], ranks: Mapping[str, int]) -> int:
    return sum(candidate.cost(ranks[candidate.name]) for candidate in candidates)


def _dense(candidates: Sequence[Candidate]) -> int:
    return sum(candidate.dense for candidate in candidates)
