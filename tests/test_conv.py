"""Factorized convolutions against the dense ones in whose place they stand."""

import copy
import math

import pytest
import torch
from conv_cases import (
    DOUBLE,
    OPTIONS,
    Convolutions,
    images,
    outputs_and_gradients,
    paths_taken,
    poison,
    randomized,
)
from torch import nn
from torch.testing import assert_close

from hf_fnl.layers import FactorizedConv2d
from hf_fnl.layers.conv import factor_kernels, kernel_matrix, matrix_kernel
from hf_fnl.spectral import spectral_init

SCHEMES = ("spatial", "channel")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)

GROUPS = {"groups": {"groups": 2, "padding": (1, 2)}, "groups-reflected": {**OPTIONS["reflect"], "groups": 2}}
each_option = pytest.mark.parametrize("options", (OPTIONS | GROUPS).values(), ids=(OPTIONS | GROUPS).keys())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()  # all layers share one forward, and it compiles anew for a limited number of them


@pytest.fixture(params=(OPTIONS | GROUPS).values(), ids=(OPTIONS | GROUPS).keys())
def dense(request) -> nn.Conv2d:
    return nn.Conv2d(6, 10, (3, 5), **request.param, **DOUBLE)


def full_rank(dense: nn.Conv2d, scheme: str) -> int:
    return min(kernel_matrix(dense.weight, scheme).shape)


# Kernels and matrices


@each_scheme
def test_a_kernel_comes_back_from_its_matrix(scheme):
    kernel = torch.randn(7, 3, 2, 5)
    matrix = kernel_matrix(kernel, scheme)
    assert matrix.shape == {"spatial": (14, 15), "channel": (7, 30)}[scheme]
    assert torch.equal(matrix_kernel(matrix, (7, 3, 2, 5), scheme), kernel)


def test_entries_of_the_spatial_matrix():
    kernel = torch.randn(7, 3, 2, 5)
    matrix = kernel_matrix(kernel, "spatial")
    assert matrix[4 * 2 + 1, 2 * 5 + 3] == kernel[4, 2, 1, 3]


@each_scheme
def test_kernels_of_the_factors_are_views_that_compose(scheme):
    shape = (7, 3, 2, 5)
    m, n = kernel_matrix(torch.empty(shape), scheme).shape
    U, V = torch.randn(m, 4, **DOUBLE), torch.randn(n, 4, **DOUBLE)
    first, second = factor_kernels(U, V, shape, scheme)
    assert (first.untyped_storage().data_ptr(), second.untyped_storage().data_ptr()) == (
        V.untyped_storage().data_ptr(),
        U.untyped_storage().data_ptr(),
    )
    composed = torch.einsum("orhw,rixy->oihwxy", second, first).reshape(shape)
    assert_close(composed, matrix_kernel(U @ V.mT, shape, scheme))


# Forward and back


@each_scheme
@pytest.mark.parametrize("compose", [True, False, None], ids=["composed", "two-steps", "chosen"])
def test_full_rank_is_the_dense_convolution(dense, scheme, compose):
    layer = FactorizedConv2d.from_dense(dense, full_rank(dense, scheme), scheme=scheme)
    layer.compose = compose
    x = images()
    assert_close(layer(x), dense(x))
    assert_close(layer(x[0]), dense(x[0]))


@each_option
@each_scheme
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("rank", [3, 40], ids=["low", "overcomplete"])
def test_both_paths_and_their_gradients_are_equal(options, scheme, deep, rank):
    make = {"scheme": scheme, "deep": deep, "overcomplete": True, **options, **DOUBLE}
    layer, x = randomized(FactorizedConv2d(6, 10, (3, 5), rank, **make)), images()
    target, results = torch.randn_like(layer(x)), []
    for layer.compose in (True, False):
        results.append(outputs_and_gradients(layer, x, target))
    assert_close(*results)


@each_scheme
def test_lower_rank_is_the_best_approximation_and_merges_exactly(dense, scheme):
    W = kernel_matrix(dense.weight.detach(), scheme)
    layer = FactorizedConv2d.from_dense(dense, 3, scheme=scheme)
    P, S, Qt = torch.linalg.svd(W)
    assert_close(layer.composed(), P[:, :3] * S[:3] @ Qt[:3])
    x = images()
    assert_close(layer.to_dense()(x), layer(x))


@each_scheme
def test_the_round_trip_at_full_rank_gives_the_kernel_and_the_options_back(dense, scheme):
    layer = FactorizedConv2d.from_dense(dense, full_rank(dense, scheme), scheme=scheme)
    back = layer.to_dense()
    assert_close(dict(back.state_dict()), dict(dense.state_dict()))
    assert back.extra_repr() == dense.extra_repr()
    assert_close(layer.dense_weight(), dense.weight)
    assert layer.weight.shape == dense.weight.shape


def test_from_dense_leaves_its_source_and_keeps_dtype_mode_and_what_is_trained(dense):
    dense.bfloat16().eval()
    dense.weight.requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    layer = FactorizedConv2d.from_dense(dense, 3)
    for module in (layer, layer.to_dense()):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"] * (dense.bias is not None)
    randomized(layer)
    assert_close(dense.state_dict(), before, rtol=0, atol=0)


def test_meta_convolutions_stay_on_meta(dense):
    layer = FactorizedConv2d.from_dense(dense.to("meta"), 3)
    for module in (layer, layer.to_dense()):
        assert all(p.is_meta for p in module.parameters())
    assert layer(images().to("meta")).shape == dense(images().to("meta")).shape


@each_option
@each_scheme
@pytest.mark.parametrize("compose", [True, False], ids=["composed", "two-steps"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_inputs_kernels_and_outputs_have_one_memory_format(options, scheme, compose, layout):
    layer = FactorizedConv2d(6, 10, (3, 5), 4, scheme=scheme, compose=compose, **options)
    x = images().float().contiguous(memory_format=layout)
    with Convolutions() as convolutions:
        y = layer(x)
    assert len(convolutions.seen) == (1 if compose else 2)
    assert all(tensor.is_contiguous(memory_format=layout) for pair in convolutions.seen for tensor in (*pair, y))


@each_scheme
@pytest.mark.parametrize("compose", [True, False], ids=["composed", "two-steps"])
def test_the_memory_format_of_a_dense_kernel_carries_over_and_back(scheme, compose):
    dense = nn.Conv2d(6, 10, (3, 5)).to(memory_format=torch.channels_last)
    layer = copy.deepcopy(FactorizedConv2d.from_dense(dense, 4, scheme=scheme))
    layer.compose = compose
    x = images().float()
    for module in (dense, layer, layer.to_dense()):
        assert module(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.to_dense().weight.is_contiguous(memory_format=torch.channels_last)
    contiguous = FactorizedConv2d.from_dense(nn.Conv2d(6, 10, (3, 5)), 4, scheme=scheme)
    assert contiguous.to_dense().weight.is_contiguous()


@each_scheme
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": (1, 3), "dilation": 2}, {"groups": 2}], ids=str)
def test_the_path_with_fewer_operations_in_training_is_taken(options, deep, scheme):
    def make(rank: int) -> FactorizedConv2d:
        return FactorizedConv2d(6, 10, (3, 2), rank, scheme=scheme, deep=deep, **options)

    full = min(make(1).shape)
    assert paths_taken(make, (1, full), (16, 6, 9, 13)) == [False, True]
    assert paths_taken(make, range(2, full), (3, 6, 17, 11))
    assert not paths_taken(make, [1], (1, 6, 6, 5))[0]  # too small an input to pay for the kernel


@each_scheme
def test_an_overcomplete_kernel_is_always_multiplied_out(scheme):
    layer = FactorizedConv2d(7, 11, 3, 40, scheme=scheme, overcomplete=True)
    with Convolutions() as convolutions:
        layer(torch.randn(1, 7, 3, 3))
    assert len(convolutions.seen) == 1


# Initialization


@each_scheme
@pytest.mark.parametrize("init", ["spectral", "spectral_ones"])
def test_it_starts_as_the_split_of_the_dense_kernel(scheme, init):
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 7, (2, 5))
    torch.manual_seed(0)
    layer = FactorizedConv2d(3, 7, (2, 5), 3, scheme=scheme, init=init)
    U, V = spectral_init(kernel_matrix(dense.weight, scheme), 3, init)
    assert torch.equal(layer.U, U)
    assert torch.equal(layer.V, V)
    assert torch.equal(layer.bias, dense.bias)


@each_scheme
def test_default_factors_are_drawn_as_convolutions_of_their_own(scheme):
    layer = FactorizedConv2d(31, 47, (3, 5), 29, scheme=scheme, init="default")
    fans = {"spatial": (29 * 3, 31 * 5), "channel": (29, 31 * 15)}[scheme]
    for factor, fan_in in zip((layer.U, layer.V), fans, strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert factor.abs().max() <= bound
        assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_deep_starts_as_shallow_and_overcomplete_is_drawn_by_default():
    torch.manual_seed(0)
    shallow = FactorizedConv2d(3, 7, 3, 5)
    torch.manual_seed(0)
    deep = FactorizedConv2d(3, 7, 3, 5, deep=True)
    assert torch.equal(deep.M, torch.eye(5))
    assert torch.equal(deep.composed(), shallow.composed())
    assert FactorizedConv2d(3, 7, 3, 25, overcomplete=True).init == "default"


@each_scheme
@pytest.mark.parametrize("init", ["spectral", "spectral_ones"])
def test_a_deep_layer_from_a_dense_one_is_the_shallow_one(dense, scheme, init):
    shallow = FactorizedConv2d.from_dense(dense, 3, scheme=scheme, init=init)
    deep = FactorizedConv2d.from_dense(dense, 3, scheme=scheme, init=init, deep=True, overcomplete=True)
    assert torch.equal(deep.M, torch.eye(3, **DOUBLE))
    assert torch.equal(deep.U, shallow.U)
    assert torch.equal(deep.V, shallow.V)
    assert deep.overcomplete


@each_scheme
def test_an_empty_overcomplete_layer_has_the_rank_and_the_options(dense, scheme):
    layer = FactorizedConv2d.empty_like(dense, 41, scheme=scheme, deep=True, overcomplete=True)
    assert [factor.shape[-1] for factor in layer.factors()] == [41, 41, 41]
    assert layer.init == "default"
    layer.reset_parameters()
    assert layer.to_dense().extra_repr() == dense.extra_repr()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, (7 * 2 + 3 * 5) * 4 / (7 * 3 * 2 * 5), id="spatial"),
        pytest.param({"scheme": "channel"}, (7 + 3 * 10) * 4 / (7 * 3 * 10), id="channel"),
        pytest.param({"deep": True}, ((7 * 2 + 3 * 5) * 4 + 16) / (7 * 3 * 10), id="deep"),
    ],
)
def test_the_compression_rate_is_that_of_the_kernel(options, expected):
    assert FactorizedConv2d(3, 7, (2, 5), 4, **options).compression_rate == pytest.approx(expected)


def test_state_dict_names_and_shapes():
    layer = FactorizedConv2d(3, 7, (2, 5), 4, deep=True)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {"U": (14, 4), "M": (4, 4), "V": (15, 4), "bias": (7,)}


def test_it_shows_what_it_is():
    layer = FactorizedConv2d(3, 7, 3, 2, stride=2, bias=False, scheme="channel")
    assert repr(layer) == (
        "FactorizedConv2d(3, 7, kernel_size=(3, 3), rank=2, scheme=channel, stride=(2, 2), bias=False)"
    )


@each_scheme
@pytest.mark.parametrize("compose", [True, False, None], ids=["composed", "two-steps", "chosen"])
def test_it_compiles_without_graph_breaks(scheme, compose):
    layer = FactorizedConv2d(6, 10, 3, 4, padding=1, scheme=scheme, compose=compose, **DOUBLE)
    x = images()
    assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: FactorizedConv2d(3, 7, 3, 0), r"rank must be in \[1, 9\], got 0", id="rank-0"),
        pytest.param(lambda: FactorizedConv2d(3, 7, 3, 10), r"rank must be in \[1, 9\], got 10", id="rank-above"),
        pytest.param(
            lambda: FactorizedConv2d(3, 7, 3, 8, scheme="channel"), r"rank must be in \[1, 7\], got 8", id="channel"
        ),
        pytest.param(
            lambda: FactorizedConv2d(3, 7, 3, 2, scheme="tucker"), "one of spatial, channel, got 'tucker'", id="scheme"
        ),
        pytest.param(lambda: FactorizedConv2d(6, 6, 3, 2, groups=6), "depthwise", id="depthwise"),
        pytest.param(lambda: FactorizedConv2d(6, 7, 3, 2, groups=3), "out_channels must be divisible", id="groups-out"),
        pytest.param(lambda: FactorizedConv2d(7, 6, 3, 2, groups=3), "in_channels must be divisible", id="groups-in"),
        pytest.param(lambda: FactorizedConv2d(6, 7, 3, 2, groups=0), "groups must be a positive integer", id="group-0"),
        pytest.param(
            lambda: FactorizedConv2d.from_dense(nn.Conv2d(3, 7, 3), 10), r"rank must be in \[1, 9\]", id="from-dense"
        ),
        pytest.param(
            lambda: FactorizedConv2d.from_dense(nn.Conv2d(3, 7, 3), 10, overcomplete=True),
            r"rank must be in \[1, 9\], got 10",
            id="from-dense-overcomplete",
        ),
        pytest.param(
            lambda: FactorizedConv2d.from_dense(nn.Conv2d(3, 7, 3, device="meta"), 10, overcomplete=True),
            r"rank must be in \[1, 9\], got 10",
            id="from-dense-meta",
        ),
        pytest.param(
            lambda: FactorizedConv2d.from_dense(nn.Conv2d(3, 7, 3), 2, init="default"), "no weight to split", id="init"
        ),
        pytest.param(lambda: FactorizedConv2d(6, 7, 3, 2, padding_mode="mirror"), "mirror", id="padding-mode"),
        pytest.param(
            lambda: FactorizedConv2d(6, 7, 3, 2, padding="same", stride=2), "not supported for strided", id="same"
        ),
        pytest.param(
            lambda: FactorizedConv2d.from_dense(nn.Conv2d(3, 7, 3).apply(poison), 2), "holds NaN or Inf", id="nan"
        ),
    ],
)
def test_it_refuses_what_it_cannot_hold(make, message):
    with pytest.raises(ValueError, match=message):
        make()
