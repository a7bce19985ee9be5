"""Parameter groups: every trainable parameter once, with the decay that its kind gets."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES
from torch import nn

from hf_fnl.attention import find_products
from hf_fnl.layers import FactorizedLinear
from hf_fnl.optim import parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.middle = FactorizedLinear(7, 5, 3)
        self.norm = nn.LayerNorm(5)
        self.convolution = nn.Conv1d(5, 2, 3)
        self.output = nn.Linear(7, 13, bias=False)
        self.output.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.ones(()))


MATRICES = ["embedding.weight", "convolution.weight"]
VECTORS = ["temperature", "middle.bias", "norm.weight", "norm.bias", "convolution.bias"]
FACTORS = ["middle.U", "middle.V"]


def shown(groups) -> list[tuple[list[str], float]]:
    return [([name for name, _ in group["params"]], group["weight_decay"]) for group in groups]


@pytest.mark.parametrize(
    ("frobenius_decay", "expected"),
    [pytest.param(None, 0.1, id="as-matrices"), pytest.param(0.0, 0.0, id="none"), pytest.param(0.3, 0.3, id="own")],
)
def test_three_groups(frobenius_decay, expected):
    model = Model()
    groups = parameter_groups(
        model, weight_decay=0.1, products=find_products(model, ["linear"]), frobenius_decay=frobenius_decay
    )
    assert [(sorted(names), decay) for names, decay in shown(groups)] == [
        (sorted(MATRICES), 0.1),
        (sorted(VECTORS), 0.0),
        (sorted(FACTORS), expected),
    ]


def test_groups_are_a_partition_of_the_trainable_parameters():
    model = Model()
    model.norm.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, products=find_products(model, ["linear"]))
    grouped = [pair for group in groups for pair in group["params"]]
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(name for name, _ in grouped) == sorted(expected)
    assert all(expected[name] is parameter for name, parameter in grouped)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        pytest.param(nn.LayerNorm(5), ["weight", "bias"], id="vectors-only"),
        pytest.param(nn.Linear(5, 7, bias=False), ["weight"], id="matrices-only"),
        pytest.param(FactorizedLinear(5, 7, 3, bias=False), ["U", "V"], id="factors-only"),
    ],
)
def test_no_group_is_empty(layer, names):
    products = find_products(layer, ["linear"]) if isinstance(layer, FactorizedLinear) else []
    assert [names for names, _ in shown(parameter_groups(layer, weight_decay=0.1, products=products))] == [names]


@pytest.mark.parametrize("kinds", [["ov"], ["qk", "ov"]], ids=["one-section", "all-sections"])
def test_a_parameter_of_several_factors_is_in_one_group_once(kinds):
    model = CASES["gpt2"].build()
    groups = parameter_groups(model, weight_decay=0.1, products=find_products(model, kinds), frobenius_decay=0.3)
    names = [f"h.{layer}.attn.{name}.weight" for layer in (0, 1) for name in ("c_attn", "c_proj")]
    assert shown(groups)[-1] == (names, 0.3)


def test_a_product_with_a_frozen_factor_is_refused():
    model = Model()
    products = find_products(model, ["linear"])
    model.middle.V.requires_grad_(False)
    with pytest.raises(ValueError, match=r"product middle cannot be decayed: middle.V is frozen or not in the model"):
        parameter_groups(model, weight_decay=0.1, products=products)


def test_a_product_of_another_model_is_refused():
    products = find_products(FactorizedLinear(5, 7, 3), ["linear"])
    with pytest.raises(ValueError, match=r"cannot be decayed: U, V is frozen or not in the model; train all"):
        parameter_groups(Model(), weight_decay=0.1, products=products)


# Decay of factors that are no product to be decayed


def net() -> nn.Module:
    return nn.Sequential(FactorizedLinear(13, 11, 3), nn.LayerNorm(11), nn.Linear(11, 5), FactorizedLinear(5, 7, 2))


@pytest.mark.parametrize(
    ("factor_decay", "scale"),
    [("crs", (3 * (13 + 11) + 2 * (5 + 7)) / (13 * 11 + 5 * 7)), ("none", 0.0)],
)
def test_the_decay_of_factors_is_scaled(factor_decay, scale):
    groups = parameter_groups(net(), weight_decay=0.3, factor_decay=factor_decay)
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decays == {
        **dict.fromkeys(["0.U", "0.V", "3.U", "3.V"], pytest.approx(0.3 * scale)),
        **dict.fromkeys(["0.bias", "1.weight", "1.bias", "2.bias", "3.bias"], 0.0),
        "2.weight": 0.3,
    }


def test_the_compression_rate_is_that_of_the_layers_without_frobenius_decay():
    model = net()
    products = [product for product in find_products(model) if product.name == "0"]
    options = {"products": products, "frobenius_decay": 0.0, "factor_decay": "crs"}
    groups = parameter_groups(model, weight_decay=0.3, **options)
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decays["0.U"] == 0
    assert decays["3.U"] == decays["3.V"] == pytest.approx(0.3 * 2 * (5 + 7) / (5 * 7))


def test_vectors_are_decayed_where_asked_for():
    groups = parameter_groups(net(), weight_decay=0.3, decay_vectors=True)
    assert {group["weight_decay"] for group in groups} == {0.3}


def test_unknown_and_idle_decays_of_factors_are_refused():
    with pytest.raises(ValueError, match="factor_decay must be one of weight, crs, none, got 'l1'"):
        parameter_groups(net(), weight_decay=0.3, factor_decay="l1")
    with pytest.raises(ValueError, match="factor_decay='crs' needs trainable factorized layers"):
        parameter_groups(nn.Linear(3, 5), weight_decay=0.3, factor_decay="crs")
