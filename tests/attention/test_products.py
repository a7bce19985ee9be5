"""Products found in models, stock and ours, against slices multiplied by hand."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForPreTraining

from hf_fnl.attention import KINDS, find_products
from hf_fnl.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, TensorizedConv2d

HEADS, HIDDEN, HEAD_DIM = 3, 15, 5


@pytest.fixture(scope="module")
def bert() -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(
        BertConfig(
            vocab_size=13,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_hidden_layers=2,
            intermediate_size=7,
            max_position_embeddings=11,
        )
    )


class TiedModel(nn.Module):
    """An embedding, a layer between, and an output layer that shares the embedding's factors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = FactorizedEmbedding(11, 5, 3)
        self.middle = FactorizedLinear(5, 7, 2, deep=True)
        self.output = FactorizedLinear(5, 11, 3)
        self.output.U, self.output.V = self.embedding.U, self.embedding.V


def test_factorized_layers_are_found_with_their_matrices():
    model = TiedModel()
    products = find_products(model, ["embedding", "linear"])
    assert [(p.name, p.kind, p.parameter_names) for p in products] == [
        ("embedding", "embedding", ("embedding.U", "embedding.V")),
        ("middle", "linear", ("middle.U", "middle.M", "middle.V")),
    ]
    for product, layer in zip(products, (model.embedding, model.middle), strict=True):
        assert torch.equal(product.matrix(model), layer.composed())
        torch.testing.assert_close(product.frobenius_norm(model), layer.composed().norm())


@pytest.mark.parametrize(
    ("scheme", "cores"),
    [("tt", ["out_core", "height_core", "width_core", "in_core"]), ("tucker", ["out_core", "core", "in_core"])],
)
def test_tensors_are_found_with_their_kernels_as_matrices(scheme, cores):
    model = nn.Sequential(
        TensorizedConv2d(3, 7, (2, 5), 4, scheme=scheme, init="default"), FactorizedConv2d(7, 2, 3, 3)
    )
    tensor, conv = find_products(model)
    assert (tensor.kind, tensor.is_tensor, conv.kind, conv.is_tensor) == ("tensor", True, "conv", False)
    assert tensor.parameter_names == tuple(f"0.{core}" for core in cores)
    matrix = tensor.matrix(model)
    assert torch.equal(matrix, model[0].dense_weight().flatten(1))
    torch.testing.assert_close(tensor.frobenius_norm(model), matrix.norm())
    torch.testing.assert_close(tensor.squared_frobenius_norm(model), matrix.norm() ** 2)


def test_products_follow_parameters_that_are_replaced():
    model = nn.Sequential(FactorizedLinear(5, 7, 3))
    product = find_products(model, ["linear"])[0]
    model[0].U = nn.Parameter(torch.zeros(7, 3))
    assert not product.matrix(model).any()


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        pytest.param(
            ["ov", "vo"], "kind of product must be any of linear, embedding, conv, qk, ov, .* got 'vo'", id="unknown"
        ),
        pytest.param(["ov", "linear"], "BertForPreTraining has no product of kind linear; it has: ov, qk", id="absent"),
        pytest.param(KINDS, "no product of kind linear, embedding", id="two-absent"),
    ],
)
def test_errors_say_what_there_is(bert, kinds, message):
    with pytest.raises(ValueError, match=message):
        find_products(bert, kinds)
