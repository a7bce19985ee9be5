"""Options that do not fit are refused at once, by name; those that do are understood."""

import math
from typing import Any

import pytest

from hf_fnl.surgery.config import FactorizationConfig, RankRule

SHARES = ("rank_scale", "ratio", "energy", "budget")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "exactly one of rank, rank_scale, ratio, energy, budget, layer_ratio; got none", id="none"),
        pytest.param({"multiple_of": 8}, "exactly one of .*; got none", id="only-a-multiple"),
        pytest.param({"rank": 8, "ratio": 0.5}, "exactly one of .*; got rank=8, ratio=0.5", id="two"),
        pytest.param(dict.fromkeys(SHARES, 0.5), "got rank_scale=0.5, ratio=0.5, energy=0.5, budget=0.5", id="four"),
        pytest.param({"rank": 0}, "rank must be an integer and at least 1, got 0", id="rank-0"),
        pytest.param({"rank": -3}, "rank must be an integer and at least 1, got -3", id="negative-rank"),
        pytest.param({"rank": 8.0}, "rank must be an integer and at least 1, got 8.0", id="rank-float"),
        pytest.param({"rank": 8, "multiple_of": 0}, "multiple_of must be an integer .* got 0", id="multiple-0"),
        pytest.param({"rank": 8, "multiple_of": 2.5}, "multiple_of must be an integer .* got 2.5", id="multiple-float"),
    ],
)
@pytest.mark.parametrize("cls", [RankRule, FactorizationConfig])
def test_a_rule_is_exactly_one_and_in_range(cls: type[RankRule], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


@pytest.mark.parametrize("option", SHARES)
def test_a_share_is_above_0_and_at_most_1(option: str) -> None:
    assert getattr(RankRule(**{option: 1}), option) == 1
    for share in (0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match=f"{option} must be above 0 and at most 1, got {share}"):
            RankRule(**{option: share})


TENSORS: dict[str, Any] = {"kinds": ["conv"], "conv_scheme": "tt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"kinds": ["linear", "lstm"]}, "any of linear, embedding, conv, qk, ov, got lstm", id="unknown-kind"
        ),
        pytest.param({"kinds": ()}, "any of linear, embedding, conv, qk, ov, got none", id="no-kind"),
        pytest.param({"kinds": "linear"}, "kinds must be a sequence of names, got the string 'linear'", id="kinds"),
        pytest.param({"include": "*.mlp"}, "include must be a sequence of names, got the string", id="include"),
        pytest.param({"exclude": "lm_head"}, "exclude must be a sequence of names, got the string", id="exclude"),
        pytest.param({"init": "svd"}, "one of spectral, spectral_ones, default, he, got 'svd'", id="init"),
        pytest.param({"conv_scheme": "cp"}, "one of spatial, channel, tt, tucker, got 'cp'", id="conv-scheme"),
        pytest.param({"conv_scheme": "tt"}, "does not go with kinds other than conv", id="tensors-of-matrices"),
        pytest.param({**TENSORS, "deep": True}, "does not go with deep", id="deep-tensors"),
        pytest.param({**TENSORS, "init": "spectral_ones"}, "does not go with init='spectral_ones'", id="tensors-ones"),
        pytest.param({"overcomplete": True}, "set init='default' or 'he', got 'spectral'", id="overcomplete-init"),
        pytest.param({"kinds": ["embedding"], "deep": True}, "not for kind 'embedding'", id="deep-embedding"),
    ],
)
def test_a_factorization_refuses_what_it_does_not_know(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FactorizationConfig(rank=8, **options)


def test_only_an_overcomplete_scale_is_above_1() -> None:
    options: dict[str, Any] = {"overcomplete": True, "init": "default"}
    assert FactorizationConfig(rank_scale=3, **options).rank_scale == 3
    with pytest.raises(ValueError, match="rank_scale must be above 0 and at most 1, got 3"):
        FactorizationConfig(rank_scale=3)
    with pytest.raises(ValueError, match="overcomplete needs rank or rank_scale"):
        FactorizationConfig(ratio=0.5, **options)
    with pytest.raises(ValueError, match="does not go with energy"):
        FactorizationConfig(energy=0.5, kinds=["conv"], conv_scheme="tt")


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        pytest.param(["*"], [], ["encoder.0.mlp.up", "encoder.1.mlp.up", "encoder.1.Out", "head"], id="all"),
        pytest.param(["*.mlp.*"], [], ["encoder.0.mlp.up", "encoder.1.mlp.up"], id="include"),
        pytest.param(["encoder.[01].*", "head"], ["*.up"], ["encoder.1.Out", "head"], id="both"),
        pytest.param(["*"], ["encoder.*"], ["head"], id="exclude"),
        pytest.param(["up", "*.out", "hea"], [], [], id="whole-names-in-their-case"),
    ],
)
def test_patterns_choose_whole_names(include: list[str], exclude: list[str], chosen: list[str]) -> None:
    config = FactorizationConfig(rank=8, include=include, exclude=exclude)
    names = ["encoder.0.mlp.up", "encoder.1.mlp.up", "encoder.1.Out", "head"]
    assert [name for name in names if config.matches(name)] == chosen
