"""Ranks by every rule: what is promised of each holds, and what cannot be met is an error."""

import dataclasses
import itertools
import re
from collections.abc import Sequence

import pytest
import torch

from hf_fnl.surgery.config import RankRule
from hf_fnl.surgery.ranks import Candidate, choose_ranks

RULES = ("ratio", "budget")  # with no other parameters, shares of the model are those of the candidates


def candidate(name: str, m: int, n: int, power: float = 1.0, copies: int = 1) -> Candidate:
    """Products of shape ``(m, n)`` that share a rank, with squared singular values ``1, 2^-power, 3^-power, ...``."""
    limit = min(m, n)
    energies = torch.arange(1, limit + 1, dtype=torch.float64) ** -power
    return Candidate(name, limit, lambda rank: copies * (m + n) * rank, copies * m * n, lambda: energies)


def heads(name: str, hidden: int, number: int, power: float = 1.0) -> Candidate:
    """Products of heads, which are factors already: at the largest rank they hold as much as before."""
    limit = hidden // number
    energies = torch.arange(1, limit + 1, dtype=torch.float64) ** -power
    return Candidate(name, limit, lambda rank: 2 * hidden * number * rank, 2 * hidden * hidden, lambda: energies)


# Products of BERT-base, whose spectra grow flatter from layer to layer.
POWERS = [2 - layer / 6 for layer in range(12)]
LINEARS = [
    candidate(f"{name}.{layer}", m, n, power)
    for layer, power in enumerate(POWERS)
    for name, m, n in [*((name, 768, 768) for name in "qkvo"), ("up", 3072, 768), ("down", 768, 3072)]
]
SHARED = [
    make
    for layer, power in enumerate(POWERS)
    for make in (
        heads(f"qk.{layer}", 768, 12, power),
        heads(f"ov.{layer}", 768, 12, power / 2),
        candidate(f"ffn.{layer}", 3072, 768, power, copies=2),
    )
]
SETS = {"every-linear-layer": LINEARS, "heads-and-feed-forward": SHARED}
each_set = pytest.mark.parametrize("candidates", SETS.values(), ids=SETS)


def parameters(candidates: Sequence[Candidate], ranks: dict[str, int | None]) -> int:
    return sum(c.dense if (rank := ranks[c.name]) is None else rank * c.count(1) for c in candidates)


def dense(candidates: Sequence[Candidate]) -> int:
    return sum(c.dense for c in candidates)


def kept(candidate: Candidate, rank: int | None) -> float:
    energies = candidate.energies()
    return float(energies[:rank].sum() / energies.sum())


def assert_allowed(candidates: Sequence[Candidate], ranks: dict[str, int | None], multiple_of: int) -> None:
    """Every rank is a multiple or the largest one, and saves parameters."""
    assert list(ranks) == [c.name for c in candidates]
    for c in candidates:
        if (rank := ranks[c.name]) is not None:
            assert type(rank) is int
            assert 1 <= rank <= c.limit
            assert rank % multiple_of == 0 or rank == c.limit
            assert rank * c.count(1) < c.dense


# One rank, one scale


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param(RankRule(rank=5), (5, 5), id="rank"),
        pytest.param(RankRule(rank=7), (7, 7), id="largest"),
        pytest.param(RankRule(rank=5, multiple_of=4), (4, 4), id="rank-down-to-a-multiple"),
        pytest.param(RankRule(rank=6, multiple_of=4), (7, 8), id="rank-up-to-a-multiple-or-the-limit"),
        pytest.param(RankRule(rank=1, multiple_of=4), (4, 4), id="not-below-a-multiple"),
        pytest.param(RankRule(rank=1, multiple_of=64), (7, 30), id="limits-below-a-multiple"),
        pytest.param(RankRule(rank_scale=1), (7, 30), id="whole"),
        pytest.param(RankRule(rank_scale=0.5), (4, 15), id="half"),
        pytest.param(RankRule(rank_scale=0.1), (1, 3), id="tenth"),
        pytest.param(RankRule(rank_scale=1e-9), (1, 1), id="at-least-1"),
        pytest.param(RankRule(rank_scale=1, multiple_of=4), (7, 30), id="whole-is-the-limit"),
        pytest.param(RankRule(rank_scale=0.5, multiple_of=4), (4, 16), id="half-of-multiples"),
    ],
)
def test_one_rank_or_one_scale(rule: RankRule, expected: tuple[int, int]) -> None:
    candidates = [candidate("small", 7, 11), candidate("large", 30, 31)]
    assert tuple(choose_ranks(candidates, rule).values()) == expected


def test_a_rank_above_the_largest_names_the_product() -> None:
    candidates = [candidate("large", 30, 31), candidate("small", 7, 11)]
    with pytest.raises(ValueError, match=r"rank of small must be in \[1, 7\], got 8"):
        choose_ranks(candidates, RankRule(rank=8))


def test_spectra_are_taken_only_where_the_rule_needs_them() -> None:
    blind = [Candidate("blind", 20, lambda rank: 50 * rank, 600, lambda: pytest.fail("a spectrum was taken"))]
    for rule in (RankRule(rank=3), RankRule(rank_scale=0.3), RankRule(ratio=0.5)):
        choose_ranks(blind, rule)


# A share of the energy


@pytest.mark.parametrize(("energy", "multiple_of"), [(0.3, 8), (0.9, 1)])
@each_set
def test_energy_is_the_smallest_rank_that_keeps_it(
    candidates: list[Candidate], energy: float, multiple_of: int
) -> None:
    ranks = choose_ranks(candidates, RankRule(energy=energy, multiple_of=multiple_of))
    assert_allowed(candidates, ranks, multiple_of)
    for c in candidates:
        rank = ranks[c.name]
        assert kept(c, rank) >= energy
        below = (c.dense if rank is None else rank * c.count(1)) - 1
        assert kept(c, below // c.count(1) // multiple_of * multiple_of) < energy


def test_energies_that_are_met_exactly_need_no_further_rank() -> None:
    even = Candidate("even", 10, lambda rank: 30 * rank, 1000, lambda: torch.ones(10))
    for number in range(1, 11):
        assert choose_ranks([even], RankRule(energy=number / 10)) == {"even": number}
    few = Candidate("few", 10, lambda rank: 30 * rank, 1000, lambda: torch.tensor([4.0, 2.0, 1.0, *[0.0] * 7]))
    assert choose_ranks([few], RankRule(energy=1)) == {"few": 3}


@pytest.mark.parametrize("rule", [RankRule(energy=1), RankRule(budget=0.4)], ids=["energy", "budget"])
def test_a_product_that_is_zero_gets_the_smallest_rank(rule: RankRule) -> None:
    zero = Candidate("zero", 10, lambda rank: 20 * rank, 200, lambda: torch.zeros(10))
    low = Candidate("low", 10, lambda rank: 20 * rank, 200, lambda: torch.tensor([2.0] * 7 + [0.0] * 3))
    assert choose_ranks([zero, low], rule) == {"zero": 1, "low": 7}


# A share of the parameters


@pytest.mark.parametrize(("share", "multiple_of"), [(0.3, 1), (0.5, 8), (0.75, 64)])
@pytest.mark.parametrize("option", RULES)
@each_set
def test_a_share_of_parameters_is_met(candidates: list[Candidate], option: str, share: float, multiple_of: int) -> None:
    if candidates is SHARED and multiple_of == 64:
        share, multiple_of = 0.9, 1  # heads are as wide as that
    ranks = choose_ranks(candidates, RankRule(**{option: share}, multiple_of=multiple_of))
    assert_allowed(candidates, ranks, multiple_of)
    assert 0.99 * share <= parameters(candidates, ranks) / dense(candidates) <= share


def test_a_ratio_is_one_scale_for_all() -> None:
    ranks = choose_ranks(SHARED, RankRule(ratio=0.5))
    scales = [ranks[c.name] / c.limit for c in SHARED]
    assert max(scales) - min(scales) <= 2 / min(c.limit for c in SHARED)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@each_set
def test_a_budget_keeps_more_energy_than_one_scale(candidates: list[Candidate], share: float) -> None:
    by_scale, by_spectra = (choose_ranks(candidates, RankRule(**{option: share})) for option in RULES)
    uniform, distributed = (sum(kept(c, r[c.name]) for c in candidates) for r in (by_scale, by_spectra))
    assert distributed > uniform


def test_a_budget_that_cannot_be_spent_is_kept() -> None:
    coarse = [candidate("a", 40, 50), candidate("b", 50, 40)]
    assert choose_ranks(coarse, RankRule(budget=0.8, multiple_of=16)) == {"a": 16, "b": 16}
    assert choose_ranks([candidate("a", 40, 40)], RankRule(budget=0.97)) == {"a": 19}


def test_a_budget_goes_to_the_products_whose_spectra_need_it() -> None:
    ranks = choose_ranks(LINEARS, RankRule(budget=0.4))
    for name in ("q", "up"):
        chosen = [ranks[f"{name}.{layer}"] or 768 for layer in range(12)]
        assert chosen == sorted(chosen)
        assert chosen[0] < chosen[-1]


def test_a_budget_of_equal_spectra_is_one_scale() -> None:
    equal = [candidate(f"{number}", 50, 60, 1.5) for number in range(4)]
    assert choose_ranks(equal, RankRule(budget=0.6)) == choose_ranks(equal, RankRule(ratio=0.6))


def test_a_budget_is_the_best_there_is() -> None:
    a, b = candidate("a", 20, 23, 0.5), candidate("b", 20, 23, 2.0)
    allowed = [{"a": i, "b": 10 - i} for i in range(1, 10)]
    best = max(allowed, key=lambda ranks: kept(a, ranks["a"]) + kept(b, ranks["b"]))
    assert choose_ranks([a, b], RankRule(budget=10 * a.count(1) / dense([a, b]))) == best


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_least_loss_for_a_budget_leaves_dense_what_compresses_badly(share: float) -> None:
    """Near the bound of Lagrange: no choice loses less than the least of loss plus price, less the price of all."""
    made = [dataclasses.replace(each, in_loss=lambda: True) for each in LINEARS]
    ranks = choose_ranks(made, RankRule(budget=share))
    assert parameters(made, ranks) <= share * dense(made)
    lost = sum(lost_energy(each, ranks[each.name]) for each in made)
    ways = []  # of each product: what it loses, and how many parameters it has; dense it loses nothing
    for each in made:
        tails = each.energies().flip(0).cumsum(0).flip(0)
        losses = torch.cat([torch.zeros(1), tails[1 : each.limit]])
        ways.append((losses, torch.tensor([each.dense, *map(each.count, range(1, each.limit))])))

    def bound(price: float) -> float:
        least = sum(float((losses + price * counts).min()) for losses, counts in ways)
        return least - price * share * dense(made)

    # Dense matrices come in large pieces: a budget between two of them is not spent as well.
    assert lost <= 1.05 * max(bound(2.0**-power) for power in torch.arange(14, 40, 0.1).tolist())
    if share == 0.9:
        assert {name.split(".")[1] for name, rank in ranks.items() if rank is None} >= {"10", "11"}  # the flattest


def lost_energy(candidate: Candidate, rank: int | None) -> float:
    return 0.0 if rank is None else float(candidate.energies()[rank:].sum())


@pytest.mark.parametrize("option", [*RULES, "energy", "rank_scale"])
@each_set
def test_more_is_never_less(candidates: list[Candidate], option: str) -> None:
    shares = [0.2, 0.25, 0.3, 0.5, 0.6]
    chosen = [choose_ranks(candidates, RankRule(**{option: share}, multiple_of=2)) for share in shares]
    totals = [parameters(candidates, ranks) for ranks in chosen]
    assert totals == sorted(set(totals))
    for lower, higher in itertools.pairwise(chosen):
        for c in candidates:
            # What rounding left over may go to one product or another, a step at most.
            slack = 2 if option in RULES else 0
            assert (lower[c.name] or c.limit) <= (higher[c.name] or c.limit) + slack


@pytest.mark.parametrize("option", [*RULES, "energy", "rank_scale"])
def test_the_order_of_the_candidates_does_not_matter(option: str) -> None:
    # Equal products, so that what rounding left over goes to some of them.
    candidates = [candidate(f"{name}{number}", m, 60) for name, m in (("a", 50), ("b", 70)) for number in range(5)]
    rule = RankRule(**{option: 0.475})
    expected = choose_ranks(candidates, rule)
    assert option not in RULES or len(set(expected.values())) > 2
    for seed in range(2):
        torch.manual_seed(seed)
        shuffled = [candidates[i] for i in torch.randperm(len(candidates))]
        assert choose_ranks(shuffled, rule) == expected


# Dense matrices, and what cannot be met


@pytest.mark.parametrize(("share", "rank"), [(0.97, 19), (0.95, 19), (0.94, 18)])
def test_a_ratio_takes_the_largest_ranks_below_it(share: float, rank: int) -> None:
    assert choose_ranks([candidate("square", 40, 40)], RankRule(ratio=share)) == {"square": rank}


@pytest.mark.parametrize("rule", [RankRule(ratio=0.9), RankRule(budget=0.9), RankRule(energy=0.9)], ids=str)
def test_factors_that_would_save_nothing_are_not_made(rule: RankRule) -> None:
    candidates = [candidate(f"square{i}", 40, 40, 0.0) for i in range(3)] + [candidate("flat", 20, 900, 0.5)]
    ranks = choose_ranks(candidates, rule)
    assert [ranks[f"square{i}"] for i in range(3)] == [None] * 3
    assert ranks["flat"] is not None
    assert_allowed(candidates, ranks, 1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        pytest.param(RankRule(ratio=1.0), "leaves every matrix dense", id="ratio"),
        pytest.param(RankRule(budget=1.0), "leaves every matrix dense", id="budget"),
        pytest.param(RankRule(energy=1.0), "leaves every matrix dense", id="energy"),
        pytest.param(
            RankRule(ratio=1e-4),
            "ratio=0.0001 cannot be met: .* need 180 of .* closest ratio is 0.045$",
            id="ratio-too-low",
        ),
        pytest.param(RankRule(budget=1e-4), "budget=0.0001 cannot .* closest budget is 0.045$", id="budget-too-low"),
        pytest.param(RankRule(layer_ratio=1e-4), "closest layer_ratio is 0.045$", id="layer-ratio-too-low"),
    ],
)
def test_what_cannot_be_met_is_an_error(rule: RankRule, message: str) -> None:
    candidates = [candidate("a", 40, 50), candidate("b", 50, 40)]
    with pytest.raises(ValueError, match=message):
        choose_ranks(candidates, rule)


@pytest.mark.parametrize(("others", "share"), [(1_000_000, 0.8), (40_000_000, 0.6)])
def test_a_ratio_and_a_budget_are_shares_of_all_parameters(others: int, share: float) -> None:
    everything = others + dense(LINEARS)
    for option in RULES:
        ranks = choose_ranks(LINEARS, RankRule(**{option: share}), others=others)
        assert (others + parameters(LINEARS, ranks)) / everything == pytest.approx(share, rel=0.01)
    ranks = choose_ranks(LINEARS, RankRule(layer_ratio=share), others=others)
    assert parameters(LINEARS, ranks) / dense(LINEARS) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(
    ("rule", "others"),
    [
        (RankRule(ratio=0.3), 8_000),
        (RankRule(budget=0.3), 8_000),
        (RankRule(ratio=0.01), 0),
    ],
    ids=str,
)
def test_the_closest_share_that_an_error_names_can_be_met(rule: RankRule, others: int) -> None:
    candidates = [candidate("a", 40, 50), candidate("b", 50, 40)]
    with pytest.raises(ValueError) as error:
        choose_ranks(candidates, rule, others=others)
    option = str(rule).partition("=")[0]
    closest = float(re.search(rf"closest {option} is ([\d.]+)$", str(error.value))[1])
    ranks = choose_ranks(candidates, dataclasses.replace(rule, **{option: closest}), others=others)
    counted = others if option != "layer_ratio" else 0
    reached = (counted + parameters(candidates, ranks)) / (counted + dense(candidates))
    assert reached == pytest.approx(closest, rel=0.01)
