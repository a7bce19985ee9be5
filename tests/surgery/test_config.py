"""Options that do not fit are refused at once, by name; those that do are understood."""

import math
from typing import Any

import pytest

from hf_fnl import FactorizedBertConfig
from hf_fnl.surgery.config import FactorizationConfig, LayerRanks, RankRule, TransformerRanks

SHARES = ("rank_scale", "ratio", "energy", "budget")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({}, "exactly one of rank, rank_scale, ratio, energy, budget, layer_ratio; got none", id="none"),
        pytest.param({"multiple_of": 8}, "exactly one of .*; got none", id="only-a-multiple"),
        pytest.param({"rank": 8, "ratio": 0.5}, "exactly one of .*; got rank=8, ratio=0.5", id="two"),
        pytest.param(dict.fromkeys(SHARES, 0.5), "got rank_scale=0.5, ratio=0.5, energy=0.5, budget=0.5", id="four"),
        pytest.param({"rank": 0}, "rank must be at least 1, got 0", id="rank-0"),
        pytest.param({"rank": -3}, "rank must be at least 1, got -3", id="negative-rank"),
        pytest.param({"rank": 8, "multiple_of": 0}, "multiple_of must be at least 1, got 0", id="multiple-0"),
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


# Ranks of our own model classes

SIZES = {"hidden_size": 35, "head_dim": 7, "intermediate_size": 22, "vocab_size": 30, "num_layers": 3}
LIMITS = {"qk_rank": 7, "ov_rank": 7, "ffn_rank": 22, "qkv_rank": 35, "embedding_rank": 30}


@pytest.mark.parametrize(("option", "limit"), LIMITS.items(), ids=LIMITS)
def test_a_rank_that_does_not_fit_is_named(option: str, limit: int) -> None:
    TransformerRanks(**{option: limit}).check(**SIZES)
    with pytest.raises(ValueError, match=rf"{option} must be in \[1, {limit}\], got {limit + 1}"):
        TransformerRanks(**{option: limit + 1}).check(**SIZES)
    with pytest.raises(ValueError, match=f"{option} must be at least 1 .* got 0"):
        TransformerRanks(**{option: 0})


@pytest.mark.parametrize("option", ["qk_rank", "ov_rank", "ffn_rank", "qkv_rank"])
def test_a_list_has_one_rank_for_each_layer(option: str) -> None:
    limit = LIMITS[option]
    ranks = TransformerRanks(**{option: [limit, None, 1]})
    ranks.check(**SIZES)
    kind = option.removesuffix("_rank")
    assert [getattr(ranks.of_layer(number), kind) for number in range(3)] == [limit, None, 1]
    with pytest.raises(ValueError, match=f"{option} needs a number or one for each of 3 layers, got 2"):
        TransformerRanks(**{option: [1, 1]}).check(**SIZES)
    with pytest.raises(ValueError, match=f"{option} needs a number or one for each of 3 layers, got 0"):
        TransformerRanks(**{option: []}).check(**SIZES)
    with pytest.raises(ValueError, match=rf"{option} must be in \[1, {limit}\], got {limit + 1}"):
        TransformerRanks(**{option: [1, limit + 1, 1]}).check(**SIZES)
    with pytest.raises(ValueError, match=f"{option} must be at least 1 .* got 0"):
        TransformerRanks(**{option: [1, 0, 1]})


def test_numbers_hold_for_every_layer() -> None:
    ranks = TransformerRanks(qk_rank=3, ffn_rank=[5, 6, None], init="default")
    methods = {"qk": "default", "ov": "default", "linear": "default"}
    assert [ranks.of_layer(number) for number in range(3)] == [
        LayerRanks(3, None, 5, None, methods),
        LayerRanks(3, None, 6, None, methods),
        LayerRanks(3, None, None, None, methods),
    ]


@pytest.mark.parametrize(("option", "heads"), [("qk_rank", 3), ("ov_rank", [3, None, None])])
def test_a_matrix_is_factorized_in_one_way(option: str, heads: int | list[int | None]) -> None:
    with pytest.raises(ValueError, match=f"qkv_rank factorizes .* as a whole and {option} cuts its heads: give one"):
        TransformerRanks(**{option: heads}, qkv_rank=[None, 3, 3])


@pytest.mark.parametrize(
    ("init", "part", "methods"),
    [
        pytest.param("spectral", "cross", ("spectral",) * 4, id="one-for-all"),
        pytest.param({}, None, ("default",) * 4, id="none"),
        pytest.param({"ov": "spectral"}, "decoder", ("default", "spectral", "default", "default"), id="kind"),
        pytest.param(
            {"ov": "spectral", "ov:cross": "default", "qk:cross": "spectral_ones"},
            "cross",
            ("spectral_ones", "default", "default", "default"),
            id="part-before-kind",
        ),
        pytest.param(
            {"ov:encoder": "spectral", "embedding": "spectral"}, None, ("default",) * 3 + ("spectral",), id="other-part"
        ),
    ],
)
def test_selectors_say_how_factors_start(
    init: str | dict[str, str], part: str | None, methods: tuple[str, ...]
) -> None:
    ranks = TransformerRanks(init=init)
    assert tuple(ranks.method(kind, part) for kind in ("qk", "ov", "linear", "embedding")) == methods
    assert tuple(ranks.of_layer(2, part).init[kind] for kind in ("qk", "ov", "linear")) == methods[:3]


def test_an_embedding_has_one_rank() -> None:
    with pytest.raises(ValueError, match="embedding_rank must be a number"):
        TransformerRanks(embedding_rank=[3, 3, 3]).check(**SIZES)


def test_an_unknown_init_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ValueError, match="factor_init must be one of spectral, spectral_ones, default, he, got 'random'"
    ):
        TransformerRanks(init="random")
    with pytest.raises(
        ValueError, match="factor_init must be one of spectral, spectral_ones, default, he, got 'random'"
    ):
        TransformerRanks(init={"linear": "random"})
    with pytest.raises(ValueError, match="got 'spectral_one'; did you mean spectral_ones"):
        TransformerRanks(init="spectral_one")
    with pytest.raises(ValueError, match=r"a key of factor_init must be any of linear, .* got 'mlp'"):
        TransformerRanks(init={"mlp": "spectral"})
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_attention_heads, got 35 and 4 heads"):
        FactorizedBertConfig(hidden_size=35, num_attention_heads=4)
