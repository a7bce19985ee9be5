"""Tensorized convolutions and the maths of their cores, against kernels multiplied out by hand."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import tensorly
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
from tensorly.decomposition import partial_tucker, tensor_train
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_fnl import tensors
from hf_fnl.layers import TensorizedConv2d

SCHEMES = ("tt", "tucker")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SHAPES = [(7, 3, 2, 5), (3, 11, 1, 1), (41, 2, 3, 1), (2, 37, 1, 3)]  # (out, in, height, width)
# Ranks at which norms are cheaper from Gram matrices, and at which they are from the kernel.
RANKS = (2, 10)

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_path = pytest.mark.parametrize("compose", [True, False, None], ids=["composed", "chain", "chosen"])
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()  # all layers share one forward, and it compiles anew for a limited number of them


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS.keys())
def dense(request) -> nn.Conv2d:
    return nn.Conv2d(6, 10, (3, 5), **request.param, **DOUBLE)


def full_rank(dense: nn.Conv2d, scheme: str) -> int:
    return TensorizedConv2d.largest_rank(dense.weight.shape, scheme)


def random_cores(shape: tuple[int, ...], rank: int, scheme: str) -> tuple[Tensor, ...]:
    return tuple(torch.randn(core, **DOUBLE) for core in tensors.core_shapes(shape, rank, scheme))


def kernel_by_hand(*cores: Tensor) -> Tensor:
    return torch.einsum("oa,ayb,bxc,ci->oiyx" if len(cores) == 4 else "oa,abyx,ib->oiyx", *cores)


# Cores and kernels


@each_scheme
@each_shape
@pytest.mark.parametrize("rank", [1, 2, 40])
def test_the_product_of_cores_is_the_kernel_by_hand(shape, rank, scheme):
    cores = random_cores(shape, rank, scheme)
    kernel = tensors.product(*cores)
    assert kernel.shape == shape
    assert_close(kernel, kernel_by_hand(*cores))


@each_scheme
@pytest.mark.parametrize("rank", [2, 3])
def test_a_kernel_is_cut_as_well_as_tensorly_cuts_it(scheme, rank):
    kernel = torch.randn(7, 5, 3, 4, **DOUBLE)
    with tensorly.backend_context("pytorch"):
        if scheme == "tt":
            cut = tensor_train(kernel.permute(0, 2, 3, 1), rank=[1, rank, rank, rank, 1])
            expected = tensorly.tt_to_tensor(cut).permute(0, 3, 1, 2)
        else:
            (core, sides), _ = partial_tucker(kernel, rank=[rank, rank], modes=[0, 1])
            expected = tensorly.tenalg.multi_mode_dot(core, sides, modes=[0, 1])
    cores = tensors.decompose(kernel, rank, scheme)
    assert tuple(core.shape for core in cores) == tensors.core_shapes(kernel.shape, rank, scheme)
    # Tucker's iteration, which begins at what is best side by side, ends sooner here.
    slack = 1.02 if scheme == "tucker" else 1 + 1e-9
    assert (kernel - tensors.product(*cores)).norm() <= slack * (kernel - expected).norm()
    assert_close(torch.stack([core.norm() for core in cores]), cores[0].norm().expand(len(cores)))


@each_scheme
@each_shape
def test_the_largest_rank_is_the_first_at_which_every_kernel_is_held_exactly(shape, scheme):
    kernel, rank = torch.randn(shape, **DOUBLE), TensorizedConv2d.largest_rank(shape, scheme)
    assert_close(tensors.product(*tensors.decompose(kernel, rank, scheme)), kernel)
    if rank > 1:
        assert not torch.allclose(tensors.product(*tensors.decompose(kernel, rank - 1, scheme)), kernel)
    assert tensors.core_shapes(shape, rank + 1, scheme) == tensors.core_shapes(shape, rank, scheme)


@each_scheme
@each_shape
@pytest.mark.parametrize("rank", [1, 2])
def test_parameters_are_counted_without_a_layer(shape, rank, scheme):
    out_channels, in_channels, *kernel_size = shape
    layer = TensorizedConv2d(in_channels, out_channels, tuple(kernel_size), rank, bias=False, scheme=scheme)
    count = sum(p.numel() for p in layer.parameters())
    assert TensorizedConv2d.parameter_count(shape, rank, scheme) == count
    assert layer.compression_rate == pytest.approx(count / math.prod(shape))


@pytest.mark.parametrize(
    ("scheme", "rank", "shapes"),
    [
        ("tt", 4, [(7, 4), (4, 2, 4), (4, 5, 3), (3, 3)]),
        ("tt", 13, [(7, 7), (7, 2, 13), (13, 5, 3), (3, 3)]),
        ("tucker", 4, [(7, 4), (4, 3, 2, 5), (3, 3)]),
    ],
)
def test_no_bond_is_wider_than_it_can_be(scheme, rank, shapes):
    layer = TensorizedConv2d(3, 7, (2, 5), rank, scheme=scheme)
    assert [tuple(core.shape) for core in layer.factors()] == shapes


def test_a_zero_kernel_has_zero_cores():
    for scheme in SCHEMES:
        assert not any(core.any() for core in tensors.decompose(torch.zeros(5, 3, 2, 2), 2, scheme))


def test_the_backend_of_tensorly_stays_what_it_was():
    with tensorly.backend_context("numpy"):
        tensors.decompose(torch.randn(5, 3, 2, 2), 2, "tt")
        assert tensorly.get_backend() == "numpy"


@each_scheme
@pytest.mark.parametrize("rank", RANKS)
def test_norm_and_decay_gradients_are_those_of_the_kernel(scheme, rank):
    cores = [core.requires_grad_() for core in random_cores((7, 5, 2, 3), rank, scheme)]
    squared = kernel_by_hand(*cores).square().sum()
    assert_close(tensors.squared_frobenius_norm(*cores), squared)
    expected = torch.autograd.grad(squared / 2, cores)
    with torch.no_grad():
        assert_close(tensors.decay_gradients(*cores), expected)


@each_scheme
def test_the_norm_takes_the_fewer_operations_of_both_ways(scheme):
    def flops(compute, cores) -> int:
        with FlopCounterMode(display=False) as counter:
            compute(*cores)
        return counter.get_total_flops()

    cheaper = []
    for rank in RANKS:
        cores = random_cores((7, 5, 2, 3), rank, scheme)
        multiplied_out = flops(tensors.product, cores)
        assert multiplied_out == 2 * tensors.product_cost(*(core.shape for core in cores))
        cheaper.append(flops(tensors.squared_frobenius_norm, cores) < multiplied_out)
    assert cheaper == [True, False]


@each_scheme
@each_shape
@pytest.mark.parametrize("rank", [2, 40])
def test_singular_values_are_those_of_the_kernel_as_a_matrix(shape, rank, scheme):
    cores = random_cores(shape, rank, scheme)
    values = tensors.singular_values(*cores)
    expected = torch.linalg.svdvals(kernel_by_hand(*cores).flatten(1))
    assert_close(values, expected[: len(values)], rtol=1e-7, atol=1e-6)
    assert not expected[len(values) :].gt(1e-9).any()


# Forward and back


@each_scheme
@each_path
def test_full_rank_is_the_dense_convolution(dense, scheme, compose):
    layer = TensorizedConv2d.from_dense(dense, full_rank(dense, scheme), scheme=scheme)
    layer.compose = compose
    x = images()
    assert_close(layer(x), dense(x))
    assert_close(layer(x[0]), dense(x[0]))


@each_option
@each_scheme
@pytest.mark.parametrize("rank", [3, 10])
def test_both_paths_and_their_gradients_are_equal(options, scheme, rank):
    layer = randomized(TensorizedConv2d(6, 10, (3, 5), rank, scheme=scheme, **options, **DOUBLE))
    x, results = images(), []
    target = torch.randn_like(layer(x))
    for layer.compose in (True, False):
        results.append(outputs_and_gradients(layer, x, target))
    assert_close(*results)


@each_scheme
def test_kernels_of_the_chain_are_views_of_the_cores(scheme):
    layer = TensorizedConv2d(6, 10, (3, 5), 4, scheme=scheme)
    for kernel, core in zip(layer.chain(*layer.factors()), reversed(layer.factors()), strict=True):
        assert kernel.untyped_storage().data_ptr() == core.untyped_storage().data_ptr()
        assert kernel.numel() == core.numel()


@each_scheme
def test_the_round_trip_at_full_rank_gives_the_kernel_and_the_options_back(dense, scheme):
    layer = TensorizedConv2d.from_dense(dense, full_rank(dense, scheme), scheme=scheme)
    back = layer.to_dense()
    assert_close(dict(back.state_dict()), dict(dense.state_dict()))
    assert back.extra_repr() == dense.extra_repr()
    assert_close(layer.dense_weight(), dense.weight)
    assert layer.weight.shape == layer.shape == dense.weight.shape


@each_scheme
def test_from_dense_leaves_its_source_and_keeps_dtype_mode_and_what_is_trained(dense, scheme):
    dense.bfloat16().eval()
    dense.weight.requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    layer = TensorizedConv2d.from_dense(dense, 3, scheme=scheme)
    for module in (layer, layer.to_dense()):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"] * (dense.bias is not None)
    randomized(layer)
    assert_close(dense.state_dict(), before, rtol=0, atol=0)


@each_scheme
def test_meta_convolutions_stay_on_meta(dense, scheme):
    layer = TensorizedConv2d.from_dense(dense.to("meta"), 3, scheme=scheme)
    for module in (layer, layer.to_dense()):
        assert all(p.is_meta for p in module.parameters())
    assert layer(images().to("meta")).shape == dense(images().to("meta")).shape


@each_option
@each_scheme
@pytest.mark.parametrize("compose", [True, False], ids=["composed", "chain"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_inputs_kernels_and_outputs_have_one_memory_format(options, scheme, compose, layout):
    layer = TensorizedConv2d(6, 10, (3, 5), 4, scheme=scheme, compose=compose, **options)
    x = images().float().contiguous(memory_format=layout)
    with Convolutions() as convolutions:
        y = layer(x)
    assert len(convolutions.seen) == (1 if compose else len(layer.factors()))
    assert all(tensor.is_contiguous(memory_format=layout) for pair in convolutions.seen for tensor in (*pair, y))


@each_scheme
def test_the_memory_format_of_a_dense_kernel_carries_over_and_back(scheme):
    dense = nn.Conv2d(6, 10, (3, 5)).to(memory_format=torch.channels_last)
    layer = TensorizedConv2d.from_dense(dense, 4, scheme=scheme)
    assert layer(images().float()).is_contiguous(memory_format=torch.channels_last)
    assert layer.to_dense().weight.is_contiguous(memory_format=torch.channels_last)


@each_scheme
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": (1, 3), "dilation": 2}], ids=str)
def test_the_path_with_fewer_operations_in_training_is_taken(options, scheme):
    def make(rank: int) -> TensorizedConv2d:
        return TensorizedConv2d(6, 10, (3, 2), rank, scheme=scheme, **options)

    full = TensorizedConv2d.largest_rank((10, 6, 3, 2), scheme)
    assert paths_taken(make, (1, full), (16, 6, 9, 13)) == [False, True]
    assert paths_taken(make, range(2, full), (3, 6, 17, 11))
    assert not paths_taken(make, [1], (1, 6, 6, 5))[0]  # too small an input to pay for the kernel


@each_scheme
@each_path
def test_it_compiles_without_graph_breaks(scheme, compose):
    layer = TensorizedConv2d(6, 10, 3, 4, padding=1, scheme=scheme, compose=compose, **DOUBLE)
    x = images()
    assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# Initialization


@each_scheme
def test_it_starts_as_the_decomposition_of_the_dense_kernel(scheme):
    torch.manual_seed(0)
    dense = nn.Conv2d(3, 7, (2, 5))
    torch.manual_seed(0)
    layer = TensorizedConv2d(3, 7, (2, 5), 3, scheme=scheme)
    assert_close(layer.factors(), tensors.decompose(dense.weight, 3, scheme), rtol=0, atol=0)
    assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize(
    ("scheme", "fans"),
    [
        # Inputs of 1-by-1, row, column and 1-by-1, or of 1-by-1, kernel and 1-by-1; in the order of the cores.
        ("tt", (29, 29 * 3, 29 * 5, 31)),
        ("tucker", (29, 29 * 15, 31)),
    ],
    ids=SCHEMES,
)
def test_default_cores_are_drawn_as_convolutions_of_their_own(scheme, fans):
    layer = TensorizedConv2d(31, 47, (3, 5), 29, scheme=scheme, init="default")
    for core, fan_in in zip(layer.factors(), fans, strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert core.abs().max() <= bound
        assert core.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    ("scheme", "init", "shapes"),
    [
        ("tt", "default", [(2, 3, 1, 1), (2, 2, 1, 5), (2, 2, 4, 1), (7, 2, 1, 1)]),
        ("tucker", "default", [(2, 3, 1, 1), (2, 2, 4, 5), (7, 2, 1, 1)]),
        ("tt", "spectral", [(7, 3, 4, 5)]),
        ("tucker", "spectral", [(7, 3, 4, 5)]),
    ],
)
def test_what_is_drawn_has_the_shape_of_kernels(scheme, init, shapes):
    layer, drawn = TensorizedConv2d(3, 7, (4, 5), 2, scheme=scheme, init=init), []

    def draw(kernel: Tensor) -> None:
        drawn.append(tuple(kernel.shape))
        nn.init.ones_(kernel)

    factors = layer.fresh_factors(draw)
    assert drawn == shapes
    if init == "default":
        assert all(torch.equal(factor, torch.ones_like(factor)) for factor in factors)
    else:
        assert_close(tensors.product(*factors), torch.ones(7, 3, 4, 5))


@each_scheme
def test_an_empty_layer_has_the_options_and_draws_nothing(dense, scheme):
    state = torch.get_rng_state()
    layer = TensorizedConv2d.empty_like(dense, 4, scheme=scheme, init="default")
    assert torch.equal(torch.get_rng_state(), state)
    layer.reset_parameters()
    assert layer.to_dense().extra_repr() == dense.extra_repr()
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("tt", ["out_core", "height_core", "width_core", "in_core", "bias"]),
        ("tucker", ["out_core", "core", "in_core", "bias"]),
    ],
)
def test_a_saved_layer_loads_bitwise(scheme, names):
    layer, other = (TensorizedConv2d(6, 10, 3, 4, scheme=scheme, **DOUBLE) for _ in range(2))
    assert list(layer.state_dict()) == names
    other.load_state_dict(layer.state_dict())
    x = images()
    assert torch.equal(other(x), layer(x))


def test_it_shows_what_it_is():
    layer = TensorizedConv2d(3, 7, 3, 2, stride=2, bias=False, scheme="tucker")
    assert repr(layer) == (
        "TensorizedConv2d(3, 7, kernel_size=(3, 3), rank=2, scheme=tucker, stride=(2, 2), bias=False)"
    )


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: TensorizedConv2d(3, 7, 3, 0), r"rank must be in \[1, 9\], got 0", id="rank-0"),
        pytest.param(lambda: TensorizedConv2d(3, 7, 3, 10), r"rank must be in \[1, 9\], got 10", id="rank-above"),
        pytest.param(
            lambda: TensorizedConv2d(3, 7, 3, 8, scheme="tucker"), r"rank must be in \[1, 7\], got 8", id="tucker"
        ),
        pytest.param(
            lambda: TensorizedConv2d.from_dense(nn.Conv2d(3, 7, 3), 10), r"rank must be in \[1, 9\]", id="from-dense"
        ),
        pytest.param(
            lambda: tensors.decompose(torch.randn(7, 3, 3, 3), 10, "tt"), r"rank must be in \[1, 9\]", id="decompose"
        ),
        pytest.param(lambda: TensorizedConv2d(3, 7, 3, 2, scheme="cp"), "one of tt, tucker, got 'cp'", id="scheme"),
        pytest.param(lambda: TensorizedConv2d(6, 8, 3, 2, groups=2), "needs groups=1, got 2", id="groups"),
        pytest.param(
            lambda: TensorizedConv2d.from_dense(nn.Conv2d(6, 8, 3, groups=2), 2), "needs groups=1", id="from-grouped"
        ),
        pytest.param(
            lambda: TensorizedConv2d(3, 7, 3, 2, init="spectral_ones"), "must be spectral or default", id="ones"
        ),
        pytest.param(lambda: TensorizedConv2d(3, 7, 3, 2, init="svd"), "one of .* got 'svd'", id="init"),
        pytest.param(
            lambda: TensorizedConv2d.from_dense(nn.Conv2d(3, 7, 3), 2, init="default"), "no kernel", id="from-default"
        ),
        pytest.param(
            lambda: TensorizedConv2d.from_dense(nn.Conv2d(3, 7, 3).apply(poison), 2), "holds NaN or Inf", id="nan"
        ),
        pytest.param(
            lambda: TensorizedConv2d.from_dense(nn.Conv2d(3, 7, 3).apply(poison), 2, scheme="tucker"),
            "holds NaN or Inf",
            id="nan-tucker",
        ),
        pytest.param(
            lambda: TensorizedConv2d(6, 7, 3, 2, padding="same", stride=2), "not supported for strided", id="same"
        ),
    ],
)
def test_it_refuses_what_it_cannot_hold(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_decomposing_needs_tensorly(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorly", None)
    dense = nn.Conv2d(3, 7, 3)
    with pytest.raises(ImportError, match=r"pip install 'hf_fnl\[tensor\]'"):
        TensorizedConv2d.from_dense(dense, 2)
    drawn = TensorizedConv2d(3, 7, 3, 2, init="default")
    TensorizedConv2d.empty_like(dense, 2).load_state_dict(drawn.state_dict())
