"""Factorized GPT-2: variants of attention, one product for queries, keys and values, initial scales."""

import math

import pytest
import torch
from family import Ranks, factorized_layers, run, run_double
from gpt2_cases import CROSS_LM, FULL, FULL_QKV, LM, LOW, LOW_QKV, SIZES
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from hf_fnl import Product, find_products
from hf_fnl.layers import FactorizedLinear

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STD = SIZES["initializer_range"]
RESIDUAL_STD = STD / math.sqrt(2 * SIZES["n_layer"])
# Attention


@pytest.mark.parametrize(("ranks", "attention"), [(FULL, "sdpa"), (FULL_QKV, "eager")], ids=["heads", "qkv"])
@pytest.mark.parametrize(
    "fields",
    [
        {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_the_variants_of_attention_are_those_of_the_stock_model(
    fields: dict[str, bool], ranks: Ranks, attention: str
) -> None:
    batch = CROSS_LM.batch()
    # The stock model upcasts to float32 and takes no float64 then.
    compute = run if "reorder_and_upcast_attn" in fields else run_double
    actual = compute(CROSS_LM.build(ranks, attention=attention, **fields), batch)
    assert_close(actual, compute(CROSS_LM.build_stock(attention=attention, **fields), batch), **CLOSE)
    if set(fields) != {"reorder_and_upcast_attn"}:  # which changes a dtype only
        usual = compute(CROSS_LM.build_stock(attention=attention), batch)
        assert not torch.allclose(actual["logits"], usual["logits"], atol=1e-2)


# One product for queries, keys and values


def test_qkv_rank_factorizes_the_inputs_of_attentions_only() -> None:
    model = CROSS_LM.build({"qkv_rank": 11})
    ranks = {name.removeprefix("transformer.h."): layer.rank for name, layer in factorized_layers(model).items()}
    names = ("attn.c_attn", "crossattention.c_attn", "crossattention.q_attn")
    assert ranks == {f"{number}.{name}": 11 for number in range(2) for name in names}
    for block in model.transformer.h:
        assert type(block.attn.c_proj) is type(block.crossattention.c_proj) is Conv1D
        assert block.attn.c_attn.dense_class is Conv1D
        assert block.attn.c_attn.shape == (63, 21)
        assert block.crossattention.c_attn.shape == (42, 21)
    kinds = [product.kind for product in find_products(model)]
    assert kinds == ["linear"] * 6


def test_kamalakaras_ranks_are_shares_of_the_smaller_side() -> None:
    model = LM.build({"qkv_rank": 13, "ffn_rank": 13})  # 62.5 % of 21
    assert sum(layer.U.numel() + layer.V.numel() for layer in factorized_layers(model).values()) == 2 * 13 * (
        (63 + 21) + 2 * (32 + 21)
    )
    assert all(type(block.attn.c_proj) is Conv1D for block in model.transformer.h)
    assert type(model.transformer.wte) is torch.nn.Embedding
    assert not isinstance(model.lm_head, FactorizedLinear)


# What it starts from


def stds(model: torch.nn.Module) -> dict[str, list[float]]:
    """Scale of both factors of every product in the first layer, and of the embedding."""
    products = [p for p in find_products(model) if ".1." not in p.name]
    names = [p.name.removeprefix("transformer.").removeprefix("h.0.") for p in products]
    return {n: [f.std().item() for f in p.factors(model)] for n, p in zip(names, products, strict=True)}


@pytest.mark.parametrize("ranks", [LOW, {**LOW_QKV, "embedding_rank": 13}], ids=["heads", "qkv"])
def test_default_draws_every_factor_as_a_weight_in_its_place(ranks: Ranks) -> None:
    wide = {"n_embd": 84, "n_inner": 130, "vocab_size": 211}  # enough entries to measure a scale
    found = stds(CROSS_LM.build({**ranks, **wide}, factor_init="default"))
    expected = {name: [STD, STD] for name in found}
    expected["mlp.c_proj"] = [RESIDUAL_STD, RESIDUAL_STD]
    for name in ("attn.ov", "crossattention.ov"):
        if name in found:
            expected[name] = [STD, RESIDUAL_STD]
    assert len(found) == (7 if "qk_rank" in ranks else 6)
    for name, values in found.items():
        assert values == pytest.approx(expected[name], rel=0.15), name


@pytest.mark.parametrize(
    ("method", "spectral"),
    [
        ("spectral", {"qk", "qk:cross", "ov", "ov:cross", "linear", "embedding"}),
        ({"qk": "spectral", "embedding": "spectral"}, {"qk", "qk:cross", "embedding"}),
        ({"qk": "spectral", "qk:cross": "default"}, {"qk"}),
        ({"ov:cross": "spectral"}, {"ov:cross"}),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_selectors_say_how_each_kind_starts(method: str | dict[str, str], spectral: set[str]) -> None:
    model, balanced = CROSS_LM.build(LOW, factor_init=method), set()
    found = find_products(model)
    for product in found:
        U, V = product.factors(model)
        if torch.allclose(U.mT @ U, V.mT @ V, rtol=1e-3, atol=1e-3):
            balanced.add(product)
    assert {selector_of(product) for product in balanced} == spectral
    assert not {selector_of(product) for product in found if product not in balanced} & spectral


def selector_of(product: Product) -> str:
    return product.kind if product.part is None else f"{product.kind}:{product.part}"


def test_a_cross_attention_may_start_otherwise_in_one_product_too() -> None:
    model = CROSS_LM.build({"qkv_rank": 11}, factor_init={"linear": "spectral_ones", "linear:cross": "spectral"})
    for product in find_products(model):
        U, _ = product.factors(model)
        is_orthonormal = torch.allclose(U.mT @ U, torch.eye(11), atol=1e-4)
        assert is_orthonormal == (product.part is None), product.name
