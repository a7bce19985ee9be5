"""Ranks for many products at once: one scale, shares of parameters or energy, a budget that goes where it counts."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_fnl.math.spectral import check_rank
from hf_fnl.surgery.config import RankRule

Ranks = dict[str, int | None]


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
        in_loss: Whether energies are losses, comparable between candidates; else each counts relative to its own sum.
            It is known once energies were asked for.
    """

    name: str
    limit: int
    count: Callable[[int], int]
    dense: int
    energies: Callable[[], Tensor]
    full: int | None = None
    in_loss: Callable[[], bool] = lambda: False

    def cost(self, rank: int) -> int:
        """Parameters at this rank; factors that would hold more than the matrix are not made."""
        return min(self.count(rank), self.dense)

    def scaled(self, scale: float, multiple_of: int) -> int:
        """The rank that a rank scale comes to."""
        return self.round(scale * (self.limit if self.full is None else self.full), multiple_of)

    def next_rank(self, rank: int, multiple_of: int) -> int:
        """The next rank that is allowed: a multiple, or the limit."""
        return min(rank + multiple_of, self.limit)

    def round(self, rank: float, multiple_of: int) -> int:
        """The nearest rank that is a multiple, or the limit; a rank in the middle goes up."""
        below = int(rank // multiple_of) * multiple_of
        above = self.next_rank(below, multiple_of)
        return below if below > 0 and rank - below < above - rank else above

    def shares(self) -> Tensor:
        """Shares of ``||W||_F^2`` that the first 1, 2, ... singular values hold ``(limit,)``; ones if it is zero."""
        cumulated = self.energies().double().cumsum(0)
        return cumulated / cumulated[-1] if cumulated[-1] > 0 else torch.ones_like(cumulated)

    def rank_or_dense(self, rank: int) -> int | None:
        """``None`` where the factors would hold as many parameters as the matrix."""
        return rank if self.count(rank) < self.dense else None


def choose_ranks(candidates: Sequence[Candidate], rule: RankRule, *, others: int = 0) -> Ranks:
    """Choose a rank for every candidate.

    Args:
        candidates: What is to be factorized.
        rule: How; see :class:`~hf_fnl.surgery.config.RankRule`.
        others: Parameters of the model that are in no candidate and stay as they are, for ``ratio`` and ``budget``.

    Returns:
        The rank of each candidate by name, ``None`` where it is to stay dense.

    Raises:
        ValueError: If ``rule.rank`` is above the largest rank of a candidate, every candidate would stay dense, or the
            smallest ranks leave more than is asked for; names the closest share.
    """
    if rule.rank is not None:
        for candidate in candidates:
            check_rank(rule.rank, candidate.limit, f"rank of {candidate.name}")
        return {candidate.name: candidate.round(rule.rank, rule.multiple_of) for candidate in candidates}
    if rule.rank_scale is not None:
        return {c.name: c.scaled(rule.rank_scale, rule.multiple_of) for c in candidates}
    if rule.energy is not None:
        chosen = {c.name: _rank_for_energy(c, rule.energy, rule.multiple_of) for c in candidates}
    else:
        chosen = _ranks_for_share(candidates, rule, others)
    ranks = {candidate.name: candidate.rank_or_dense(chosen[candidate.name]) for candidate in candidates}
    if all(rank is None for rank in ranks.values()):
        raise ValueError(f"{rule} leaves every matrix dense: factors would hold as many parameters; ask for less")
    return ranks


def _ranks_for_share(candidates: Sequence[Candidate], rule: RankRule, others: int) -> dict[str, int]:
    """Ranks that leave a share of the parameters, those of the whole model or of the candidates alone."""
    options = {"ratio": rule.ratio, "budget": rule.budget, "layer_ratio": rule.layer_ratio}
    option, share = next((name, value) for name, value in options.items() if value is not None)
    others = 0 if option == "layer_ratio" else others
    dense, multiple_of = sum(candidate.dense for candidate in candidates), rule.multiple_of
    everything = others + dense
    smallest = {candidate.name: candidate.next_rank(0, multiple_of) for candidate in candidates}
    needed = _total(candidates, smallest)
    if (least := (others + needed) / everything) > share:
        beside = f"{others:,} of {everything:,} parameters are in other layers (see kinds), and " if others else ""
        raise ValueError(
            f"{option}={share:.4g} cannot be met: {beside}the smallest ranks that are multiples of {multiple_of} need "
            f"{needed:,} of the other {dense:,}; the closest {option} is {_rounded_up(least)}"
        )
    target = share * everything - others
    if option == "budget":
        return _spend(candidates, smallest, target, multiple_of)
    return _by_one_scale(candidates, target, multiple_of)


def _rounded_up(share: float) -> float:
    """A share with four digits that is not below it."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 3)
    return float(f"{math.ceil(share / unit - 1e-9) * unit:.4g}")


def _rank_for_energy(candidate: Candidate, share: float, multiple_of: int) -> int:
    """The smallest rank that keeps a share of the energy, rounded up."""
    needed = int((candidate.shares() < share).sum()) + 1
    return min(math.ceil(needed / multiple_of) * multiple_of, candidate.limit)


def _by_one_scale(candidates: Sequence[Candidate], target: float, multiple_of: int) -> dict[str, int]:
    """The ranks of the largest scale that leaves no more parameters; what rounding left over is then given out."""

    def at(scale: float) -> dict[str, int]:
        return {c.name: c.scaled(scale, multiple_of) for c in candidates}

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(candidates, at(middle)) <= target else (low, middle)
    return _fill(candidates, at(low), target, multiple_of, lambda candidate, rank: rank / candidate.limit)


def _spend(
    candidates: Sequence[Candidate], smallest: Mapping[str, int], target: float, multiple_of: int
) -> dict[str, int]:
    """Give every next unit of rank to the product where it keeps the most energy per parameter."""
    start, shares = smallest, {candidate.name: candidate.shares().tolist() for candidate in candidates}
    if all(candidate.in_loss() for candidate in candidates):
        start = _least_loss(candidates, smallest, target, multiple_of)
        shares = {candidate.name: candidate.energies().cumsum(0).tolist() for candidate in candidates}

    def negative_gain(candidate: Candidate, rank: int) -> float:
        raised, kept = candidate.next_rank(rank, multiple_of), shares[candidate.name]
        return (kept[rank - 1] - kept[raised - 1]) / (candidate.count(raised) - candidate.count(rank))

    return _fill(candidates, start, target, multiple_of, negative_gain)


def _least_loss(
    candidates: Sequence[Candidate], smallest: Mapping[str, int], target: float, multiple_of: int
) -> dict[str, int]:
    """The ranks that lose the least energy in all; what compresses badly stays dense, which costs no energy.

    What a matrix loses is no convex function of its parameters, for between the rank of equal size and the dense
    matrix there is nothing. Steps therefore go along the lower convex hull of its points, the steepest first.
    """
    steps: list[tuple[float, str, int, int]] = []
    for candidate in candidates:
        energies = candidate.energies().double()
        lost = (energies.sum() - energies.cumsum(0)).clamp(min=0).tolist()
        rank = smallest[candidate.name]
        points = [(candidate.cost(rank), lost[rank - 1], rank)]
        while (rank := candidate.next_rank(rank, multiple_of)) < candidate.limit:
            if candidate.rank_or_dense(rank) is None:
                break
            points.append((candidate.cost(rank), lost[rank - 1], rank))
        points.append((candidate.cost(candidate.limit), 0.0, candidate.limit))
        for before, after in itertools.pairwise(_lower_hull(points)):
            slope = (after[1] - before[1]) / (after[0] - before[0])
            steps.append((slope, candidate.name, after[2], after[0] - before[0]))
    chosen, total, ended = dict(smallest), _total(candidates, smallest), set[str]()
    for _, name, rank, more in sorted(steps):
        if name in ended or total + more > target:
            ended.add(name)
            continue
        chosen[name], total = rank, total + more
    return chosen


def _lower_hull(points: Sequence[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Return the points, by increasing cost, that lie on the lower convex hull of cost and loss."""
    hull: list[tuple[int, float, int]] = []
    for point in points:
        while hull and (point[0] <= hull[-1][0] or (len(hull) > 1 and _is_above(hull[-2], hull[-1], point))):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(first: tuple[int, float, int], middle: tuple[int, float, int], last: tuple[int, float, int]) -> bool:
    """Whether the point in the middle lies on or above the line through the others."""
    return (middle[1] - first[1]) * (last[0] - first[0]) >= (last[1] - first[1]) * (middle[0] - first[0])


def _fill(
    candidates: Sequence[Candidate],
    ranks: Mapping[str, int],
    target: float,
    multiple_of: int,
    priority: Callable[[Candidate, int], float],
) -> dict[str, int]:
    """Raise ranks step by step, lowest priority value first, as far as a number of parameters allows."""
    chosen, total = dict(ranks), _total(candidates, ranks)
    by_name = {candidate.name: candidate for candidate in candidates}
    # Names decide between equals, so that the order of the candidates does not.
    queue = [(priority(c, chosen[c.name]), c.name) for c in candidates if chosen[c.name] < c.limit]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        candidate, rank = by_name[name], chosen[name]
        raised = candidate.next_rank(rank, multiple_of)
        more = candidate.cost(raised) - candidate.cost(rank)
        if total + more > target:
            continue
        chosen[name], total = raised, total + more
        if raised < candidate.limit:
            heapq.heappush(queue, (priority(candidate, raised), name))
    return chosen


def _total(candidates: Sequence[Candidate], ranks: Mapping[str, int]) -> int:
    return sum(candidate.cost(ranks[candidate.name]) for candidate in candidates)
