"""Ranks for many products at once: one scale, a share of parameters or energy, or a budget that spectra share out."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fnl.config import RankRule
from hf_fnl.spectral import check_rank

Ranks = dict[str, int | None]

RATIO_TOLERANCE = 0.01


@dataclass(frozen=True)
class Candidate:
    """A product whose rank is to be chosen, or several that share one rank, as the heads of an attention do.

    Args:
        name: What it is called in errors and in the result.
        limit: Its largest rank.
        unit: Parameters per unit of rank: ``m + n`` for a matrix of shape ``(m, n)``.
        dense: Parameters of what it replaces: ``m * n``.
        energies: Squared singular values ``(limit,)``, descending; called only where the rule needs them.
    """

    name: str
    limit: int
    unit: int
    dense: int
    energies: Callable[[], Tensor]

    def cost(self, rank: int) -> int:
        """Parameters at this rank; factors that would hold more than the matrix are not made."""
        return min(rank * self.unit, self.dense)

    def round(self, rank: float, multiple_of: int) -> int:
        """The nearest multiple that is allowed; the limit itself where it is no multiple."""
        return max(min(round(rank / multiple_of) * multiple_of, self.limit), min(multiple_of, self.limit))

    def kept(self, rank: int) -> int | None:
        """``None`` where the factors would hold as many parameters as the matrix."""
        return rank if rank * self.unit < self.dense else None


def choose_ranks(candidates: Sequence[Candidate], rule: RankRule) -> Ranks:
    """Choose a rank for every candidate.

    Args:
        candidates: What is to be factorized.
        rule: How; see :class:`~hf_fnl.config.RankRule`.

    Returns:
        The rank of each candidate by name, ``None`` where it is to stay dense.

    Raises:
        ValueError: If ``rule.rank`` is above the largest rank of a candidate, a share of parameters cannot be met
            within 1 %, or every candidate would stay dense.
    """
    if rule.rank is not None:
        for candidate in candidates:
            check_rank(rule.rank, candidate.limit, f"rank of {candidate.name}")
        return {candidate.name: candidate.round(rule.rank, rule.multiple_of) for candidate in candidates}
    if rule.rank_scale is not None:
        return {c.name: c.round(rule.rank_scale * c.limit, rule.multiple_of) for c in candidates}
    if rule.energy is not None:
        chosen = {c.name: c.round(_rank_for_energy(c, rule.energy, rule.multiple_of), 1) for c in candidates}
    elif rule.ratio is not None:
        chosen = _ranks_for_ratio(candidates, rule.ratio, rule.multiple_of)
    else:
        assert rule.budget is not None
        chosen = _ranks_for_budget(candidates, rule.budget, rule.multiple_of)
    ranks = {candidate.name: candidate.kept(chosen[candidate.name]) for candidate in candidates}
    if all(rank is None for rank in ranks.values()):
        raise ValueError(f"{rule} leaves every matrix dense: factors would hold as many parameters; ask for less")
    return ranks


def kept_energy(energies: Tensor, rank: int | None) -> float:
    """Share of ``||W||_F^2`` that the leading ``rank`` squared singular values hold; 1 where ``rank`` is ``None``."""
    return 1.0 if rank is None else float(energies[:rank].sum() / energies.sum().clamp(min=torch.finfo().tiny))


def _rank_for_energy(candidate: Candidate, share: float, multiple_of: int) -> int:
    energies = candidate.energies().double()
    cumulated = energies.cumsum(0) / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)
    # The last sums may lie a rounding error below one.
    needed = int((cumulated < share * (1 - 1e-12)).sum()) + 1
    return min(-(-needed // multiple_of) * multiple_of, candidate.limit)


def _ranks_for_ratio(candidates: Sequence[Candidate], ratio: float, multiple_of: int) -> dict[str, int]:
    """The largest scale that stays below the target, by bisection; what rounding left is then given out."""
    target = ratio * sum(candidate.dense for candidate in candidates)

    def at(scale: float) -> dict[str, int]:
        return {c.name: c.round(scale * c.limit, multiple_of) for c in candidates}

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(candidates, at(middle)) <= target else (low, middle)
    ranks = at(high if _total(candidates, at(high)) <= target else low)
    return _fill(candidates, ranks, target, multiple_of, lambda candidate, rank: rank / candidate.limit)


def _ranks_for_budget(candidates: Sequence[Candidate], budget: float, multiple_of: int) -> dict[str, int]:
    """Give every next unit of rank to the product where it keeps the largest share of energy per parameter."""
    target = budget * sum(candidate.dense for candidate in candidates)
    shares = {}
    for candidate in candidates:
        energies = candidate.energies().double()
        shares[candidate.name] = (energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)).cumsum(0)

    def gain(candidate: Candidate, rank: int) -> float:
        step = min(rank + multiple_of, candidate.limit)
        cumulated = shares[candidate.name]
        return -float(cumulated[step - 1] - cumulated[rank - 1]) / ((step - rank) * candidate.unit)

    smallest = {candidate.name: candidate.round(1, multiple_of) for candidate in candidates}
    return _fill(candidates, smallest, target, multiple_of, gain)


def _fill(
    candidates: Sequence[Candidate],
    ranks: Mapping[str, int],
    target: float,
    multiple_of: int,
    priority: Callable[[Candidate, int], float],
) -> dict[str, int]:
    """Raise ranks by ``multiple_of``, lowest priority value first, as long as the target allows it."""
    chosen, total = dict(ranks), _total(candidates, ranks)
    queue = [(priority(c, chosen[c.name]), i) for i, c in enumerate(candidates) if chosen[c.name] < c.limit]
    heapq.heapify(queue)
    while queue:
        _, number = heapq.heappop(queue)
        candidate = candidates[number]
        rank = chosen[candidate.name]
        raised = min(rank + multiple_of, candidate.limit)
        more = candidate.cost(raised) - candidate.cost(rank)
        if total + more > target:
            continue
        chosen[candidate.name], total = raised, total + more
        if raised < candidate.limit:
            heapq.heappush(queue, (priority(candidate, raised), number))
    dense = sum(candidate.dense for candidate in candidates)
    if abs(total - target) > RATIO_TOLERANCE * dense:
        raise ValueError(
            f"{target / dense:.3f} of the parameters cannot be met within {RATIO_TOLERANCE:.0%} by ranks that are "
            f"multiples of {multiple_of}: the nearest is {total / dense:.3f}; lower multiple_of or change the share"
        )
    return chosen


def _total(candidates: Sequence[Candidate], ranks: Mapping[str, int]) -> int:
    return sum(candidate.cost(ranks[candidate.name]) for candidate in candidates)
