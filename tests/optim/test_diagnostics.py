"""Diagnostics of products against the formed matrices, and counts against numbers worked out by hand."""

import math

import pytest
import torch
from attention_cases import CASES
from torch import nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from hf_fnl import FactorizationConfig, factorize_, to_linear_
from hf_fnl.attention import Product, find_products
from hf_fnl.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, TensorizedConv2d
from hf_fnl.math.factors import non_orthogonality
from hf_fnl.optim.diagnostics import diagnose, forward_flops, parameter_count, summarize


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(FactorizedEmbedding(11, 5, 3), FactorizedLinear(5, 7, 4, deep=True), nn.Linear(7, 3)).double()


def bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=13, hidden_size=15, num_attention_heads=3, num_hidden_layers=2, intermediate_size=7)
    return BertModel(config).double()


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    tensors = [TensorizedConv2d(5, 3, (2, 3), 4, scheme=scheme, init="default") for scheme in ("tt", "tucker")]
    return nn.Sequential(FactorizedConv2d(3, 5, (3, 2), 4), FactorizedConv2d(5, 5, 2, 3, deep=True), *tensors).double()


def expected_figures(product: Product, model: nn.Module, learning_rate: float) -> dict:
    factors, matrices = product.factors(model), product.matrix(model)
    frobenius, nuclear, operator = (torch.linalg.matrix_norm(matrices, order) for order in ("fro", "nuc", 2))
    figures = {
        "frobenius_norm": frobenius,
        "nuclear_norm": nuclear,
        "operator_norm": operator,
        "effective_rank": nuclear / operator,
        "effective_step_size": learning_rate / frobenius**2,
    }
    if product.kind == "tensor":
        return figures
    return figures | {
        "nuclear_norm_bound": sum(p.square().sum((-2, -1)) for p in factors) / 2,
        "non_orthogonality": non_orthogonality(*factors),
    }


def llama() -> nn.Module:
    return CASES["llama"].build().double()


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (stack, ("embedding", "linear")),
        (bert, ("qk", "ov")),
        (llama, ("ov",)),
        (convolutions, ("conv", "tensor")),
    ],
    ids=["layers", "heads", "groups-of-heads", "convolutions"],
)
def test_figures_are_those_of_the_formed_matrices(make, kinds):
    model = make()
    products = find_products(model, kinds)
    figures = diagnose(model, products, learning_rate=0.1)
    assert list(figures) == [p.name for p in products]
    for product in products:
        expected = expected_figures(product, model, 0.1)
        assert figures[product.name] == pytest.approx({name: value.mean().item() for name, value in expected.items()})


def test_step_size_is_given_with_a_learning_rate_only():
    model = stack()
    assert "effective_step_size" not in diagnose(model, find_products(model, ["linear"]))["1"]


@pytest.mark.parametrize("learning_rate", [0.0, 0.1])
def test_a_zero_product_has_rank_zero_and_nothing_is_nan(learning_rate):
    model = nn.Sequential(FactorizedLinear(5, 7, 3))
    nn.init.zeros_(model[0].U)
    figures = diagnose(model, find_products(model, ["linear"]), learning_rate=learning_rate)["0"]
    assert figures["effective_rank"] == 0
    assert figures["effective_step_size"] == math.inf
    assert not any(math.isnan(value) for value in figures.values())


def test_half_precision_factors_are_measured_in_float32():
    model = stack().bfloat16()
    products = find_products(model, ["linear", "embedding"])
    with torch.autocast("cpu", torch.bfloat16):
        figures = diagnose(model, products)
    assert figures == diagnose(model.float(), products)


def test_spectral_initialization_shows_in_the_figures():
    model = nn.Sequential(FactorizedLinear(5, 7, 3), FactorizedLinear(5, 7, 3, init="spectral_ones")).double()
    for layer in model:
        layer.reset_parameters()
    spectral, ones = diagnose(model, find_products(model, ["linear"])).values()
    assert spectral["nuclear_norm_bound"] == pytest.approx(spectral["nuclear_norm"])
    assert spectral["non_orthogonality"] == pytest.approx(0, abs=1e-6)
    assert ones["effective_rank"] == pytest.approx(3)


def test_no_products_is_an_error():
    with pytest.raises(ValueError, match=r"no products to diagnose; find_products\(model\) lists"):
        diagnose(stack(), [])


def test_a_factor_that_is_not_finite_is_named():
    model = stack()
    model[1].V.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="1 has no singular values, for its factors hold NaN or Inf"):
        diagnose(model, find_products(model))


def test_summary_is_the_mean_of_each_kind():
    model = bert()
    products = find_products(model, ("qk", "ov"))
    figures = diagnose(model, products)
    summary = summarize(figures, products)
    assert set(summary) == {f"{kind}/{name}" for kind in ("qk", "ov") for name in figures[products[0].name]}
    norms = [figures[p.name]["frobenius_norm"] for p in products if p.kind == "ov"]
    assert summary["ov/frobenius_norm"] == pytest.approx(sum(norms) / len(norms))


def test_parameters_of_layers_and_of_their_dense_equivalents():
    model = stack()
    model[2].requires_grad_(False)
    factors = (11 + 5) * 3 + (7 + 5 + 4) * 4
    rest = 7 + (7 + 1) * 3  # the bias of the second layer and the whole third
    dense = 11 * 5 + 5 * 7 + rest
    assert parameter_count(model) == {
        "total": factors + rest,
        "trainable": factors + 7,
        "in_products": factors,
        "dense_equivalent": dense,
        "ratio": (factors + rest) / dense,
    }


@pytest.mark.parametrize("make", [stack, convolutions])
def test_the_dense_equivalent_is_the_dense_model(make):
    model = make()
    dense = nn.Sequential(*(layer.to_dense() if hasattr(layer, "to_dense") else layer for layer in model))
    assert parameter_count(model)["dense_equivalent"] == parameter_count(dense)["total"]
    assert parameter_count(dense)["ratio"] == 1


def test_cores_of_tensors_count_as_factors():
    model = convolutions()
    cores = 3 * 3 + 3 * 2 * 4 + 4 * 3 * 4 + 4 * 5 + (3 * 3 + 3 * 4 * 2 * 3 + 5 * 4)
    assert parameter_count(model[2:])["in_products"] == cores
    assert parameter_count(model[2:])["total"] == cores + 3 + 3


def test_tied_factors_count_once():
    embedding, output = FactorizedEmbedding(11, 5, 3), FactorizedLinear(5, 11, 3, bias=False)
    output.U, output.V = embedding.U, embedding.V
    count = parameter_count(nn.Sequential(embedding, output))
    assert (count["total"], count["in_products"], count["dense_equivalent"]) == (48, 48, 55)


def test_flops_are_two_per_weight():
    model = nn.Sequential(
        FactorizedEmbedding(11, 5, 3), FactorizedLinear(5, 7, 4, deep=True), nn.Linear(7, 3), Conv1D(2, 3)
    )
    factorized = 5 * 3 + (7 + 5 + 4) * 4 + 7 * 3 + 3 * 2
    dense = 7 * 5 + 7 * 3 + 3 * 2
    assert forward_flops(model) == {
        "factorized": 2 * factorized,
        "dense_equivalent": 2 * dense,
        "ratio": factorized / dense,
    }


@pytest.mark.parametrize(("kinds", "pairs"), [(("qk", "ov"), False), (("linear",), True)], ids=["heads", "pairs"])
def test_flops_of_the_dense_model_are_those_that_it_had(kinds, pairs):
    model = bert()
    dense = forward_flops(model)["factorized"]
    factorize_(model, FactorizationConfig(rank=2, kinds=kinds))
    if pairs:
        to_linear_(model)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    expected = {"factorized": 2 * sum(weight.numel() for weight in weights), "dense_equivalent": dense}
    assert forward_flops(model) == expected | {"ratio": expected["factorized"] / dense}


def test_counts_of_a_model_without_linear_layers():
    assert forward_flops(nn.LayerNorm(5)) == {"factorized": 0, "dense_equivalent": 0, "ratio": 0}
