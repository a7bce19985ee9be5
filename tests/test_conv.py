"""Factorized convolutions against the dense ones in whose place they stand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_fnl.layers import FactorizedConv2d
from hf_fnl.layers.conv import factor_kernels, kernel_matrix, matrix_kernel
from hf_fnl.spectral import spectral_init

DOUBLE = {"dtype": torch.float64}
SCHEMES = ("spatial", "channel")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)

# Options of a convolution from 6 channels to 10 with a kernel of 3 by 5.
OPTIONS = {
    "plain": {},
    "stride": {"stride": (2, 3)},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": (3, 2), "padding": 2},
    "all": {"stride": (2, 1), "padding": (3, 1), "dilation": (1, 2)},
    "same": {"padding": "same"},
    "same-dilated": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid", "stride": 2},
    "groups": {"groups": 2, "padding": (1, 2)},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2)},
    "replicate": {"padding": (1, 3), "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "without-bias": {"bias": False},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def dense(request) -> nn.Conv2d:
    return nn.Conv2d(6, 10, (3, 5), **request.param, **DOUBLE)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 6, 13, 11)), **DOUBLE)


def full_rank(dense: nn.Conv2d, scheme: str) -> int:
    return min(kernel_matrix(dense.weight, scheme).shape)


def randomized(layer: nn.Module) -> nn.Module:
    """Away from the initial values, where M is the identity."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


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


@each_scheme
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
@pytest.mark.parametrize("rank", [3, 40], ids=["low", "overcomplete"])
def test_both_paths_and_their_gradients_are_equal(dense, scheme, deep, rank):
    options = OPTIONS["groups"] if dense.groups > 1 else {"stride": dense.stride, "padding": dense.padding}
    make = {"scheme": scheme, "deep": deep, "overcomplete": True, **options, **DOUBLE}
    layer = randomized(FactorizedConv2d(6, 10, (3, 5), rank, **make))
    x, results = images(), []
    target = torch.randn_like(layer(x))
    for layer.compose in (True, False):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        results.append([y, *torch.autograd.grad((y * target).sum(), [inputs, *layer.parameters()])])
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


@each_scheme
@pytest.mark.parametrize("compose", [True, False], ids=["composed", "two-steps"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_the_memory_format_is_that_of_the_input(scheme, compose, layout):
    layer = FactorizedConv2d(6, 10, 3, 4, padding=1, scheme=scheme, compose=compose)
    x = images().float().contiguous(memory_format=layout)
    assert layer(x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("rank", "scheme", "shape", "expected"),
    [
        # 3x3, 32 to 32 channels: 9 * 32 * 32 multiplications a point, against rank * 6 * 32 or rank * 10 * 32.
        pytest.param(16, "spatial", (8, 32, 20, 20), False, id="low"),
        pytest.param(60, "spatial", (8, 32, 20, 20), True, id="above-the-break-even"),
        pytest.param(24, "channel", (8, 32, 20, 20), False, id="channel-low"),
        pytest.param(31, "channel", (8, 32, 20, 20), True, id="channel-above"),
        pytest.param(200, "spatial", (1, 32, 5, 5), True, id="overcomplete"),
        pytest.param(47, "spatial", (1, 32, 3, 3), False, id="too-small-an-input-to-pay-for-the-kernel"),
    ],
)
def test_the_path_with_fewer_multiplications_is_taken(rank, scheme, shape, expected):
    layer = FactorizedConv2d(32, 32, 3, rank, padding=1, scheme=scheme, overcomplete=True)
    assert layer._composing_is_cheaper(torch.empty(shape), (1, 1)) == expected


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
        pytest.param(lambda: FactorizedConv2d(6, 7, 3, 2, groups=3), "divisible by groups", id="groups"),
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


def poison(module: nn.Module) -> None:
    nn.init.constant_(module.weight, torch.nan)
