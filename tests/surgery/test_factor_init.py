"""How factors begin: drawn each by its own fan-in (``he``), or cut from trained weights as ``factor_init`` says."""

from __future__ import annotations

import math
from typing import Any

import bert_cases
import gpt2_cases
import marian_cases
import pytest
import torch
from conv_cases import factorized
from family import Head, attentions
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_fnl import (
    FactorizationConfig,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    factorize_,
    spectral_init,
)
from hf_fnl.layers import Factorized
from hf_fnl.layers.linear import dense_weight

HEADS = 3
FAMILIES: dict[str, tuple[Head, dict[str, Any]]] = {
    "bert": (bert_cases.MASKED_LM, {"hidden_size": 48, "intermediate_size": 80, "initializer_range": 0.02}),
    "gpt2": (gpt2_cases.LM, {"n_embd": 48, "n_inner": None, "initializer_range": 0.02}),
    "marian": (
        marian_cases.MT,
        {"d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "decoder_layers": 1, "init_std": 0.02},
    ),
}
RANKS = {"qk_rank": 5, "ov_rank": 7, "ffn_rank": 9, "embedding_rank": 11}
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str, **options: Any) -> PreTrainedModel:
    head, sizes = FAMILIES[family]
    return head.build(options, vocab_size=101, **sizes)


def trained(family: str, **options: Any) -> PreTrainedModel:
    """A dense model of ours, away from its initial values."""
    model = build(family, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:  # Marian's positions are given
            nn.init.normal_(parameter, std=0.3)
    return model


def assert_drawn_by_he(weight: Tensor, fan_in: int) -> None:
    """Mean and variance within six standard errors of those of a normal distribution."""
    weight, variance = weight.detach().double(), 2 / fan_in
    assert abs(weight.mean()) < 6 * math.sqrt(variance / weight.numel())
    assert abs(weight.var() / variance - 1) < 6 * math.sqrt(2 / weight.numel())
    assert abs(weight).max() > 2 * math.sqrt(variance)  # a uniform distribution ends before


def heads_of(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Query, key, value and output of every attention, each ``(heads, hidden, r)``."""
    found = [tuple(each.projection(side).weight for side in range(4)) for each in attentions(model).values()]
    assert found
    return found


# He's rule

LAYERS = {
    "linear": (lambda: FactorizedLinear(70, 50, 30, init="he"), (30, 70)),
    "linear-deep": (lambda: FactorizedLinear(70, 50, 30, init="he", deep=True), (30, None, 70)),
    "linear-wide": (lambda: FactorizedLinear(30, 20, 90, init="he", overcomplete=True), (90, 30)),
    "embedding": (lambda: FactorizedEmbedding(70, 50, 30, init="he"), (30, 50)),
    "spatial": (lambda: FactorizedConv2d(20, 30, (3, 5), 40, init="he"), (40, 100)),
    "spatial-groups": (lambda: FactorizedConv2d(40, 30, (3, 5), 40, groups=2, init="he"), (40, 100)),
    "spatial-wide": (lambda: FactorizedConv2d(20, 30, 3, 130, init="he", overcomplete=True), (130, 60)),
    "channel": (lambda: FactorizedConv2d(20, 30, (3, 5), 25, scheme="channel", init="he"), (25, 300)),
    "tt": (lambda: factorized("tt", 20, 30, (3, 5), 18, init="he"), (18, 54, 90, 20)),
    "tucker": (lambda: factorized("tucker", 20, 30, (3, 5), 18, init="he"), (18, 270, 20)),
}


@pytest.mark.parametrize(("make", "fans"), LAYERS.values(), ids=LAYERS)
def test_each_factor_of_a_layer_is_drawn_by_its_own_fan_in(make, fans):
    layer = make()
    assert layer.init == "he"
    for factor, fan_in in zip(layer.factors(), fans, strict=True):
        if fan_in is None:
            assert torch.equal(factor, torch.eye(len(factor)))
        else:
            assert_drawn_by_he(factor, fan_in)


def test_the_padding_row_stays_zero():
    layer = FactorizedEmbedding(70, 50, 30, padding_idx=4, init="he")
    assert not layer.U[4].any()
    assert layer.U[5].all()


@each_family
def test_each_factor_of_a_model_is_drawn_by_its_own_fan_in(family):
    """The output matrix of an attention adds up what all heads give it."""
    model = build(family, factor_init="he", qk_rank=15, ov_rank=13, ffn_rank=40, embedding_rank=30)
    for query, key, value, output in heads_of(model):
        for side in (query, key, value):
            assert_drawn_by_he(side, 48)
        assert_drawn_by_he(output, 13 * HEADS)
    layers = [module for module in model.modules() if isinstance(module, Factorized)]
    assert {layer.rank for layer in layers} == {40, 30}
    for layer in layers:
        rows = layer.U.any(1)  # without the padding
        assert rows.sum() >= layer.shape[0] - 1
        assert_drawn_by_he(layer.U[rows], layer.rank)
        assert_drawn_by_he(layer.V, layer.shape[1])


def test_each_kind_has_a_rule_of_its_own():
    model = build("gpt2", factor_init={"linear": "he", "ov": "spectral"}, qk_rank=15, ov_rank=13, ffn_rank=40)
    query, _, value, output = heads_of(model)[0]
    assert query.std().item() == pytest.approx(0.02, rel=0.1)  # default: as the model draws
    assert_close((value.mT @ value).diagonal(0, 1, 2), (output.mT @ output).diagonal(0, 1, 2), rtol=1e-3, atol=1e-5)
    assert_drawn_by_he(model.transformer.h[0].mlp.c_fc.U, 40)


@pytest.mark.parametrize("init", ["default", "he"])
def test_surgery_draws_what_it_is_told(init):
    model = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=60, num_attention_heads=2, intermediate_size=90))
    factorize_(model, FactorizationConfig(rank=40, include=["*.intermediate.*"], init=init))
    layer = model.bert.encoder.layer[0].intermediate.dense
    if init == "he":
        assert_drawn_by_he(layer.U, 40)
        assert_drawn_by_he(layer.V, 60)
    else:
        assert layer.U.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("scheme", ["channel", "tt"])
def test_surgery_draws_overcomplete_kernels_and_others_by_he(scheme):
    options: dict[str, Any] = {"overcomplete": True} if scheme in ("spatial", "channel") else {}
    model = nn.Sequential(nn.Conv2d(20, 30, 3, padding=1))
    factorize_(model, FactorizationConfig(kinds=("conv",), rank=20, conv_scheme=scheme, init="he", **options))
    assert_drawn_by_he(model[0].factors()[0], 20)


# Cut from trained weights


@pytest.mark.parametrize(("family", "given"), [("bert", "configuration"), ("gpt2", "argument"), ("marian", "in-place")])
def test_singular_values_are_ones_where_the_configuration_says_so(family, given, tmp_path):
    model_class = FAMILIES[family][0].ours
    model = trained(family) if given == "argument" else trained(family, factor_init="spectral_ones")
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    dense = {name: dense_weight(module) for name, module in linear}
    if given == "in-place":
        model.factorize_(**RANKS)
    else:
        options = {"factor_init": "spectral_ones"} if given == "argument" else {}
        model = model_class.from_dense(model, **RANKS, **options)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FactorizedLinear) and name in dense}
    assert layers
    for name, layer in layers.items():
        if layer.rank == RANKS["ffn_rank"]:
            U, V = spectral_init(dense[name], layer.rank, "spectral_ones")
            assert_close(layer.composed(), U @ V.mT, rtol=1e-4, atol=1e-4)
    for layer in (m for m in model.modules() if isinstance(m, Factorized)):
        values = torch.linalg.svdvals(layer.composed().detach())[: layer.rank]
        assert_close(values, torch.ones(layer.rank), rtol=1e-4, atol=1e-4)
    for *_, value, output in heads_of(model):
        assert_close(torch.linalg.svdvals(value @ output.mT)[:, :7], torch.ones(HEADS, 7), rtol=1e-4, atol=1e-4)
    assert model.config.factor_init == "spectral_ones"

    tokens = torch.arange(1, 9)[None]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if family == "marian" else {})
    expected = model(**inputs).logits
    assert_close(model.merge()(**inputs).logits, expected, rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(model_class.from_pretrained(tmp_path).eval()(**inputs).logits, expected)


def test_queries_and_keys_without_biases_have_ones():
    model = trained("gpt2", factor_init={"qk": "spectral_ones", "linear": "spectral"})
    nn.init.zeros_(model.transformer.h[0].attn.c_attn.bias)
    before = heads_of_stock(model)
    model.factorize_(qk_rank=5)
    query, key, *_ = heads_of(model)[0]
    P, _, Qt = torch.linalg.svd(before[0] @ before[1].mT)
    assert_close(query @ key.mT, P[..., :5] @ Qt[:, :5], rtol=1e-3, atol=1e-4)


def heads_of_stock(model: nn.Module) -> tuple[Tensor, Tensor]:
    query, key, _ = dense_weight(model.transformer.h[0].attn.c_attn).detach().split(48)
    return query.unflatten(0, (HEADS, -1)).mT, key.unflatten(0, (HEADS, -1)).mT


def test_each_kind_is_cut_by_its_own_rule():
    model = trained("bert", factor_init={"linear": "spectral_ones", "ov": "spectral"})
    model.factorize_(ffn_rank=9, ov_rank=7)
    layer = model.bert.encoder.layer[0].intermediate.dense
    assert_close(torch.linalg.svdvals(layer.composed().detach())[:9], torch.ones(9), rtol=1e-4, atol=1e-4)
    *_, value, output = heads_of(model)[0]
    assert (torch.linalg.svdvals(value @ output.mT)[:, 0] - 1).abs().min() > 1e-2


BATCH = {"input_ids": torch.arange(1, 33).view(4, 8), "attention_mask": torch.ones(4, 8, dtype=torch.long)}


@pytest.mark.parametrize(
    ("init", "options", "message"),
    [
        pytest.param("he", {"ffn_rank": 9}, "'he' of linear draws factors", id="he"),
        pytest.param("default", {"ov_rank": 7}, "'default' of ov draws factors", id="default"),
        pytest.param({"ov": "spectral"}, {"qk_rank": 5}, "leaves qk out.*of qk to 's", id="unnamed-kind"),
        pytest.param("spectral_ones", {"ffn_rank": 9, "calibration": BATCH}, "calibration .*_ones'", id="calibrated"),
        pytest.param("spectral_ones", {"qk_rank": 9, "calibration": BATCH}, "calibration .*_ones'", id="calibrated-qk"),
    ],
)
def test_what_would_lose_what_was_learned_is_refused(init, options, message):
    model = trained("bert", factor_init=init)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.factorize_(**options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_kind_that_stays_dense_may_be_drawn():
    model = trained("bert", factor_init={"linear": "spectral", "qk": "he"})
    model.factorize_(ffn_rank=9)
    assert model.bert.encoder.layer[0].intermediate.dense.rank == 9
