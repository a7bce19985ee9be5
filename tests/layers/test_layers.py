"""Factorized layers against the dense layers in whose place they stand."""

import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from hf_fnl.math.spectral import spectral_init
from hf_fnl.math.truncation import Moments

DOUBLE = {"dtype": torch.float64}


def conv1d() -> Conv1D:
    layer = Conv1D(7, 5)  # 5 in, 7 out
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.double()


# Dense layers with an input for each and the layer that takes their place.
DENSE = {
    "linear": (lambda: nn.Linear(5, 7, **DOUBLE), torch.randn(2, 11, 5, **DOUBLE), FactorizedLinear),
    "linear-without-bias": (lambda: nn.Linear(7, 5, bias=False, **DOUBLE), torch.randn(7, **DOUBLE), FactorizedLinear),
    "conv1d": (conv1d, torch.randn(2, 11, 5, **DOUBLE), FactorizedLinear),
    "embedding": (lambda: nn.Embedding(7, 5, **DOUBLE), torch.randint(7, (2, 11)), FactorizedEmbedding),
    "padded-embedding": (
        lambda: nn.Embedding(7, 5, padding_idx=2, **DOUBLE),
        torch.randint(7, (2, 11)),
        FactorizedEmbedding,
    ),
}


@pytest.fixture(params=DENSE.values(), ids=DENSE.keys())
def case(request):
    make, x, cls = request.param
    return make(), x, cls


LAYERS = {
    "linear": (lambda: FactorizedLinear(5, 7, 3, **DOUBLE), torch.randn(2, 11, 5, **DOUBLE)),
    "without-bias": (lambda: FactorizedLinear(5, 7, 3, bias=False, **DOUBLE), torch.randn(11, 5, **DOUBLE)),
    "deep": (lambda: FactorizedLinear(5, 7, 3, deep=True, **DOUBLE), torch.randn(11, 5, **DOUBLE)),
    "overcomplete": (lambda: FactorizedLinear(5, 7, 15, overcomplete=True, **DOUBLE), torch.randn(11, 5, **DOUBLE)),
    "embedding": (lambda: FactorizedEmbedding(7, 5, 3, **DOUBLE), torch.randint(7, (2, 11))),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer_and_input(request):
    make, x = request.param
    layer = make()
    for parameter in layer.parameters():  # away from the initial values, where M is the identity
        nn.init.normal_(parameter)
    return layer, x


# Forward and back


def test_full_rank_is_the_dense_layer(case):
    dense, x, cls = case
    torch.testing.assert_close(cls.from_dense(dense, 5)(x), dense(x))


def test_forward_is_that_of_the_composed_matrix(layer_and_input):
    layer, x = layer_and_input
    W = layer.composed()
    expected = nn.functional.linear(x, W, layer.bias) if x.is_floating_point() else nn.functional.embedding(x, W)
    torch.testing.assert_close(layer(x), expected)


def test_to_dense_computes_the_same_and_leaves_its_source(layer_and_input):
    layer, x = layer_and_input
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_lower_rank_is_the_best_approximation(case):
    dense, _, cls = case
    W = dense.weight.mT if isinstance(dense, Conv1D) else dense.weight
    U, V = spectral_init(W, 3)
    layer = cls.from_dense(dense, 3)
    assert torch.equal(layer.U, U)
    assert torch.equal(layer.V, V)


def test_from_dense_leaves_its_source_untouched(case):
    dense, _, cls = case
    before = copy.deepcopy(dense.state_dict())
    layer = cls.from_dense(dense, 5)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


def test_round_trip_keeps_dtype_mode_and_what_is_trained(case):
    dense, _, cls = case
    dense.bfloat16().eval()
    dense.weight.requires_grad_(False)
    layer = cls.from_dense(dense, 3)
    back = layer.to_dense()
    for module in (layer, back):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert [n for n, p in module.named_parameters() if p.requires_grad] == [
            n for n, p in dense.named_parameters() if p.requires_grad
        ]
    assert getattr(back, "padding_idx", None) == getattr(dense, "padding_idx", None)


@pytest.mark.parametrize(("frozen", "is_trained"), [("", True), ("U", True), ("V", True), ("UV", False)])
def test_a_merged_weight_is_trained_if_a_factor_was(frozen, is_trained):
    layer = FactorizedLinear(5, 7, 3)
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    assert layer.to_dense().weight.requires_grad == layer.weight.requires_grad == is_trained


def test_meta_layers_stay_on_meta(case):
    dense, _, cls = case
    layer = cls.from_dense(dense.to("meta"), 3)
    for module in (layer, layer.to_dense()):
        assert all(p.is_meta for p in module.parameters())


def test_a_layer_made_on_meta_draws_nothing():
    state = torch.get_rng_state()
    FactorizedLinear(5, 7, 3, device="meta")
    FactorizedEmbedding(7, 5, 3, padding_idx=0, device="meta")
    assert torch.equal(torch.get_rng_state(), state)


def test_state_dict_names_and_shapes():
    layer = FactorizedLinear(5, 7, 3, deep=True)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"U": (7, 3), "M": (3, 3), "V": (5, 3), "bias": (7,)}
    assert list(FactorizedLinear(5, 7, 3, bias=False).state_dict()) == ["U", "V"]
    assert list(FactorizedEmbedding(7, 5, 3).state_dict()) == ["U", "V"]


# Initialization


@pytest.mark.parametrize("init", ["spectral", "spectral_ones"])
@pytest.mark.parametrize(("dense", "ours"), [(nn.Linear, FactorizedLinear), (nn.Embedding, FactorizedEmbedding)])
def test_a_layer_starts_as_the_split_of_the_dense_layers_weight(dense, ours, init):
    drawn = dense(5, 7)
    torch.manual_seed(0)
    layer = ours(5, 7, 3, init=init)
    assert all(map(torch.equal, layer.factors(), spectral_init(drawn.weight, 3, init)))
    assert layer.bias is None or torch.equal(layer.bias, drawn.bias)


def test_default_factors_are_drawn_as_linear_layers_of_their_own():
    layer = FactorizedLinear(301, 203, 101, init="default")
    for factor, fan_in in ((layer.U, 101), (layer.V, 301)):
        bound = 1 / math.sqrt(fan_in)
        assert factor.abs().max() <= bound
        assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("make", [FactorizedLinear, functools.partial(FactorizedConv2d, kernel_size=3)])
def test_deep_layers_start_as_shallow_ones_and_overcomplete_ones_are_drawn_by_default(make):
    shallow = make(5, 7, rank=3)
    torch.manual_seed(0)
    deep = make(5, 7, rank=3, deep=True)
    assert torch.equal(deep.M, torch.eye(3))
    assert torch.equal(deep.composed(), shallow.composed())
    overcomplete = make(5, 7, rank=45, overcomplete=True)
    assert (overcomplete.init, overcomplete.U.shape[1], overcomplete.V.shape[1]) == ("default", 45, 45)
    assert make(5, 7, rank=3, overcomplete=True).init == "spectral"


@pytest.mark.parametrize("init", ["spectral", "spectral_ones", "default"])
def test_the_padding_row_starts_as_zero_and_gets_no_gradient(init):
    layer = FactorizedEmbedding(7, 5, 3, padding_idx=2, init=init)
    ids = torch.tensor([[2, 4, 2]])
    assert torch.equal(layer(ids)[0, 0], torch.zeros(5))
    layer(ids).sum().backward()
    assert torch.equal(layer.U.grad[2], torch.zeros(3))
    assert layer.U.grad[4].any()


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: FactorizedLinear(5, 7, 0), r"rank must be in \[1, 5\], got 0", id="rank-0"),
        pytest.param(lambda: FactorizedLinear(5, 7, 6), r"rank must be in \[1, 5\], got 6", id="rank-above"),
        pytest.param(lambda: FactorizedLinear(5, 7, 3.0), "rank must be an integer, got 3.0", id="rank-float"),
        pytest.param(lambda: FactorizedLinear(5, 7, 0, overcomplete=True), "got 0", id="overcomplete-rank-0"),
        pytest.param(lambda: FactorizedLinear(5, 7, 3, init="svd"), "one of .* got 'svd'", id="init"),
        pytest.param(lambda: FactorizedEmbedding(7, 5, 6), r"rank must be in \[1, 5\], got 6", id="embedding-rank"),
        pytest.param(
            lambda: FactorizedLinear.from_dense(nn.Linear(5, 7), 6), r"rank must be in \[1, 5\]", id="from-dense-rank"
        ),
        pytest.param(
            lambda: FactorizedLinear.from_dense(nn.Linear(5, 7), 3, init="default"), "no weight to split", id="default"
        ),
        pytest.param(
            lambda: FactorizedLinear.from_dense(nn.Linear(5, 7).apply(poison), 3), "holds NaN or Inf", id="nan"
        ),
        pytest.param(
            lambda: FactorizedEmbedding.from_dense(nn.Embedding(7, 5, max_norm=1.0), 3), "max_norm", id="max-norm"
        ),
        pytest.param(
            lambda: FactorizedEmbedding.from_dense(nn.Embedding(7, 5, sparse=True), 3), "sparse gradients", id="sparse"
        ),
        pytest.param(
            lambda: FactorizedConv2d.from_dense(nn.ConvTranspose2d(5, 5, 3), 3), "of a Conv2d with", id="transposed"
        ),
        pytest.param(lambda: FactorizedConv2d.from_dense(ScaledConv2d(5, 7, 3), 3), "of a Conv2d with", id="forward"),
        pytest.param(lambda: FactorizedLinear.from_dense(nn.Embedding(7, 5), 3), "of a Linear or Conv1D", id="class"),
        pytest.param(
            lambda: FactorizedLinear.from_dense(
                nn.Linear(5, 7), 3, moments=Moments.of(torch.randn(9, 5)), init="spectral_ones"
            ),
            "moments .* need init='spectral', got 'spectral_ones'",
            id="moments",
        ),
        pytest.param(
            lambda: FactorizedLinear.from_dense(weight_norm(nn.Linear(5, 7)), 3), "parametrized", id="parametrized"
        ),
    ],
)
def test_layers_refuse_what_they_cannot_hold(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class ScaledConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def poison(module: nn.Module) -> None:
    nn.init.constant_(module.weight, torch.nan)
