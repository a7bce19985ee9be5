"""What holds for factorized convolutions of all schemes, against the dense ones in whose place they stand."""

import copy
import itertools
import math

import pytest
import torch
from conv_cases import (
    DOUBLE,
    LAYERS,
    OPTIONS,
    SCHEMES,
    SOME_OPTIONS,
    Convolutions,
    convolution,
    factorized,
    from_dense,
    full_rank,
    images,
    outputs_and_gradients,
    paths_taken,
    poison,
    randomized,
    with_each_scheme,
)
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from hf_fnl.layers import FactorizedConv2d, TensorizedConv2d
from hf_fnl.layers.conv import kernel_matrix
from hf_fnl.math import tensors
from hf_fnl.math.spectral import spectral_init
from hf_fnl.surgery.config import CONV_SCHEMES

PATHS = (True, False, None)  # multiplied out, a chain of convolutions, and the one with fewer operations
FACTORS = {
    "low": {"rank": 3},
    "high": {"rank": 10},
    "deep": {"rank": 3, "deep": True},
    "overcomplete": {"rank": 40, "overcomplete": True},
    "deep-overcomplete": {"rank": 40, "deep": True, "overcomplete": True},
}
COSTS = {
    "plain": {},
    "padding": {"padding": (4, 7)},
    "stride": {"stride": (1, 3), "dilation": 2},
    "groups": {"groups": 2},
    "deep": {"deep": True},
    "deep-groups": {"deep": True, "groups": 2},
}

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)

# Sizes and options of convolutions whose kernels have axes of length 1 somewhere.
NARROW = {
    "3x3": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 1},
    "pointwise": {"in_channels": 8, "out_channels": 12, "kernel_size": 1, "stride": 2},
    "row": {"in_channels": 8, "out_channels": 12, "kernel_size": (1, 3), "padding": (0, 1)},
    "column-strided": {"in_channels": 8, "out_channels": 12, "kernel_size": (3, 1), "stride": 2},
    "dilated": {"in_channels": 8, "out_channels": 12, "kernel_size": 3, "padding": 2, "dilation": 2},
    "one-channel-in": {"in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding_mode": "circular", "padding": 1},
    "one-channel-out": {"in_channels": 8, "out_channels": 1, "kernel_size": 3, "padding": 1},
    "groups": {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "padding": 1, "groups": 4},
    "groups-strided": {"in_channels": 16, "out_channels": 24, "kernel_size": 3, "stride": 2, "groups": 2},
    "groups-pointwise": {"in_channels": 8, "out_channels": 12, "kernel_size": 1, "groups": 2},
    "groups-reflected": {
        "in_channels": 8,
        "out_channels": 12,
        "kernel_size": (3, 2),
        "padding": "same",
        "padding_mode": "reflect",
        "groups": 2,
    },
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "channels-last-sliced": lambda x: LAYOUTS["channels-last"](torch.cat([x, x], 1))[:, : x.shape[1]],
    "channels-last-viewed": lambda x: LAYOUTS["channels-last"](x).view_as(x),
    "batch-inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


# Forward and back


@with_each_scheme(options=OPTIONS)
def test_full_rank_is_the_dense_convolution_there_and_back(scheme, options):
    dense, x = convolution(**options), images()
    layer = from_dense(dense, scheme)
    for layer.compose in PATHS:
        assert_close(layer(x), dense(x))
        assert_close(layer(x[0]), dense(x[0]))
    assert_close(layer.dense_weight(), dense.weight)
    assert layer.weight.shape == layer.dense_shape == dense.weight.shape
    back = layer.to_dense()
    assert_close(dict(back.state_dict()), dict(dense.state_dict()))
    assert back.extra_repr() == dense.extra_repr()


@each_scheme
def test_even_kernels_are_padded_as_by_the_dense_convolution(scheme):
    dense, x = nn.Conv2d(6, 10, (2, 4), padding="same", padding_mode="circular", **DOUBLE), images()
    assert_close(from_dense(dense, scheme)(x), dense(x))


@with_each_scheme(options=OPTIONS, factors=FACTORS)
def test_both_paths_their_gradients_and_the_merged_convolution_agree(scheme, options, factors):
    layer = randomized(factorized(scheme, 6, 10, (3, 5), init="default", **factors, **options, **DOUBLE))
    x, results = images(), []
    target = torch.randn_like(layer(x))
    for layer.compose in (True, False):
        results.append(outputs_and_gradients(layer, x, target))
    assert_close(*results)
    assert_close(layer.to_dense()(x), results[0][0])


@each_scheme
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "without-bias"])
def test_from_dense_leaves_its_source_and_keeps_dtype_mode_and_what_is_trained(scheme, bias):
    dense = convolution(bias=bias).bfloat16().eval()
    dense.weight.requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    layer = from_dense(dense, scheme, 3)
    for module in (layer, layer.to_dense()):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert [n for n, p in module.named_parameters() if p.requires_grad] == ["bias"] * bias
    randomized(layer)
    assert_close(dense.state_dict(), before, rtol=0, atol=0)


@with_each_scheme(options=SOME_OPTIONS)
def test_meta_convolutions_stay_on_meta(scheme, options):
    dense, x = convolution(**options).to("meta"), images().to("meta")
    layer = from_dense(dense, scheme, 3)
    for module in (layer, layer.to_dense()):
        assert all(p.is_meta for p in module.parameters())
    assert layer(x).shape == dense(x).shape


@with_each_scheme(options=SOME_OPTIONS)
def test_inputs_kernels_and_outputs_have_one_memory_format(scheme, options):
    for compose, layout in itertools.product((True, False), (torch.contiguous_format, torch.channels_last)):
        layer = factorized(scheme, 6, 10, (3, 5), 4, compose=compose, init="default", **options)
        with Convolutions() as convolutions:
            y = layer(images().float().contiguous(memory_format=layout))
        assert len(convolutions.seen) == (1 if compose else len(layer.factors()))
        assert all(tensor.is_contiguous(memory_format=layout) for pair in convolutions.seen for tensor in (*pair, y))


@with_each_scheme(sizes=NARROW, small={"one": {"batch": 1, "rank": 1}, "more": {"batch": 3, "rank": 2}})
def test_no_layout_of_input_or_kernel_changes_outputs_or_gradients(scheme, sizes, small):
    """In float32: torch has other kernels, with other ways to read strides, for it than for float64."""
    dense = nn.Conv2d(**sizes, **DOUBLE)
    rank = min(small["rank"], full_rank(dense.weight.shape, scheme))
    exact = from_dense(dense, scheme, rank)
    images64 = images(small["batch"], sizes["in_channels"], 9, 7)
    target = torch.randn_like(exact(images64))
    exact.compose = True
    expected = outputs_and_gradients(exact, images64, target)
    for kernel in (torch.contiguous_format, torch.channels_last):
        dense = exact.to_dense().float().to(memory_format=kernel)
        layer = from_dense(dense, scheme, rank)
        layer.load_state_dict(exact.state_dict())
        for layer.compose, (name, lay_out) in itertools.product((True, False), LAYOUTS.items()):
            found = outputs_and_gradients(layer, lay_out(images64.float()), target.float())
            assert_close(found, [tensor.float() for tensor in expected], rtol=1e-4, atol=1e-4, msg=name)
            with torch.no_grad():
                assert_close(layer(lay_out(images64.float())), found[0])


@with_each_scheme(options=COSTS)
def test_the_path_with_fewer_operations_in_training_is_taken(scheme, options):
    def make(rank: int) -> nn.Module:
        return factorized(scheme, 6, 10, (3, 2), rank, init="default", **options)

    full = full_rank(make(1).dense_shape, scheme)
    assert paths_taken(make, (1, full), (16, 6, 9, 13)) == [False, True]
    assert paths_taken(make, range(2, full), (3, 6, 17, 11))
    assert not paths_taken(make, [1], (1, 6, 6, 5))[0]  # too small an input to pay for the kernel


# Initialization


@pytest.mark.parametrize(
    ("scheme", "init"), [*((scheme, "spectral") for scheme in SCHEMES), *((s, "spectral_ones") for s in CONV_SCHEMES)]
)
def test_it_starts_as_the_split_of_a_dense_kernel(scheme, init):
    dense = nn.Conv2d(3, 7, (2, 5))
    torch.manual_seed(0)
    drawn = factorized(scheme, 3, 7, (2, 5), 3, init=init)
    if scheme in CONV_SCHEMES:
        expected = spectral_init(kernel_matrix(dense.weight, scheme), 3, init)
    else:
        expected = tensors.decompose(dense.weight, 3, scheme)
    for layer in (drawn, from_dense(dense, scheme, 3, init=init)):
        assert_close(layer.factors(), expected, rtol=0, atol=0)
        assert torch.equal(layer.bias, dense.bias)


@pytest.mark.parametrize(
    ("scheme", "fans"),
    [
        # Inputs of the last convolution of the chain to the first, in the order of the factors. That of the spatial
        # scheme counts as if it were 1 x 1, as the authors' code draws it.
        ("spatial", (29, 31 * 5)),
        ("channel", (29, 31 * 15)),
        ("tt", (29, 29 * 3, 29 * 5, 31)),
        ("tucker", (29, 29 * 15, 31)),
    ],
    ids=SCHEMES,
)
def test_default_factors_are_drawn_as_convolutions_of_their_own(scheme, fans):
    layer = factorized(scheme, 31, 47, (3, 5), 29, init="default")
    for factor, fan_in in zip(layer.factors(), fans, strict=True):
        bound = 1 / math.sqrt(fan_in)
        assert factor.abs().max() <= bound
        assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@with_each_scheme(options=SOME_OPTIONS)
def test_an_empty_layer_has_the_options_and_draws_nothing(scheme, options):
    dense, state = convolution(**options), torch.get_rng_state()
    layer = LAYERS[scheme].empty_like(dense, 4, scheme=scheme, init="default")
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.init == "default"
    layer.reset_parameters()
    assert layer.to_dense().extra_repr() == dense.extra_repr()
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("scheme", "names"),
    [
        ("spatial", ["U", "V"]),
        ("channel", ["U", "V"]),
        ("tt", ["out_core", "height_core", "width_core", "in_core"]),
        ("tucker", ["out_core", "core", "in_core"]),
    ],
    ids=SCHEMES,
)
def test_a_saved_layer_loads_bitwise(scheme, names):
    layer, other = (factorized(scheme, 6, 10, 3, 4, **DOUBLE) for _ in range(2))
    assert list(layer.state_dict()) == [*names, "bias"]
    other.load_state_dict(layer.state_dict())
    assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
    x = images()
    assert_close(other(x), layer(x))


@each_scheme
def test_it_shows_what_it_is(scheme):
    shown = f"3, 7, kernel_size=(3, 3), rank=2, scheme={scheme}, stride=(2, 2), bias=False"
    layer = factorized(scheme, 3, 7, 3, 2, stride=2, bias=False)
    assert repr(layer) == f"{LAYERS[scheme].__name__}({shown})"


# What is refused


@pytest.mark.parametrize(("scheme", "limit"), [("spatial", 9), ("channel", 7), ("tt", 9), ("tucker", 7)], ids=SCHEMES)
def test_a_rank_out_of_range_is_refused(scheme, limit):
    for rank, device in ((0, "cpu"), (limit + 1, "cpu"), (limit + 1, "meta")):
        message = rf"rank must be in \[1, {limit}\], got {rank}"
        with pytest.raises(ValueError, match=message):
            factorized(scheme, 3, 7, 3, rank, device=device)
        with pytest.raises(ValueError, match=message):
            from_dense(nn.Conv2d(3, 7, 3, device=device), scheme, rank)


@each_scheme
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "svd"}, "one of .* got 'svd'"),
        ({"padding_mode": "mirror"}, "mirror"),
        ({"padding": "same", "stride": 2}, "not supported for strided"),
    ],
    ids=["init", "padding-mode", "same"],
)
def test_options_that_no_convolution_has_are_refused(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        factorized(scheme, 6, 7, 3, 2, **options)


@each_scheme
def test_a_kernel_that_cannot_be_split_is_refused(scheme):
    dense = nn.Conv2d(3, 7, 3)
    with pytest.raises(ValueError, match=r"no (weight to split|kernel to decompose)"):
        from_dense(dense, scheme, 2, init="default")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        from_dense(dense.apply(poison), scheme, 2)


@pytest.mark.parametrize(
    "layer", [FactorizedConv2d(3, 5, 3, 4, padding=1, **DOUBLE), TensorizedConv2d(3, 5, 3, 3, padding=1, **DOUBLE)]
)
def test_gradients_of_each_image_are_taken_by_torch_func(layer):
    images, factors = torch.randn(2, 3, 6, 6, **DOUBLE), dict(layer.named_parameters())

    def loss(factors, image):
        return torch.func.functional_call(layer, factors, (image,)).square().sum()

    of_each = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, images)
    summed = torch.autograd.grad(layer(images).square().sum(), list(factors.values()))
    torch.testing.assert_close([gradients.sum(0) for gradients in of_each.values()], list(summed))


def test_all_schemes_and_ways_compile_once_for_batches_of_all_sizes():
    torch.compiler.reset()
    layers = (
        factorized(scheme, 6, 6, 3, 2, padding=1, compose=compose, init="default")
        for scheme, compose in itertools.product(SCHEMES, (False, True))
    )
    model, graphs = nn.Sequential(*layers), CompileCounter()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=graphs)
    for count in (5, 8, 11):
        x = torch.randn(count, 6, 7, 13)
        assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
    assert graphs.frame_count == 1
