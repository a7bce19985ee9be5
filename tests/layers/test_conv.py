"""Convolutions whose kernel is a product of matrices: what tensorized ones do not share."""

import pytest
import torch
from conv_cases import DOUBLE, Convolutions, convolution
from torch import nn

from hf_fnl.layers import FactorizedConv2d
from hf_fnl.layers.conv import kernel_matrix, matrix_kernel
from hf_fnl.surgery.config import CONV_SCHEMES

each_scheme = pytest.mark.parametrize("scheme", CONV_SCHEMES)


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
def test_an_overcomplete_kernel_is_always_multiplied_out(scheme):
    layer = FactorizedConv2d(7, 11, 3, 40, scheme=scheme, overcomplete=True)
    with Convolutions() as convolutions:
        layer(torch.randn(1, 7, 3, 3))
    assert len(convolutions.seen) == 1


@each_scheme
@pytest.mark.parametrize("init", ["spectral", "spectral_ones"])
def test_a_deep_layer_from_a_dense_one_is_the_shallow_one(scheme, init):
    dense = convolution()
    shallow = FactorizedConv2d.from_dense(dense, 3, scheme=scheme, init=init)
    deep = FactorizedConv2d.from_dense(dense, 3, scheme=scheme, init=init, deep=True, overcomplete=True)
    assert torch.equal(deep.M, torch.eye(3, **DOUBLE))
    assert torch.equal(deep.U, shallow.U)
    assert torch.equal(deep.V, shallow.V)
    assert deep.overcomplete


@each_scheme
def test_an_empty_overcomplete_layer_has_the_rank(scheme):
    layer = FactorizedConv2d.empty_like(convolution(), 41, scheme=scheme, deep=True, overcomplete=True)
    assert [factor.shape[-1] for factor in layer.factors()] == [41, 41, 41]
    assert layer.init == "default"
    layer.reset_parameters()
    assert torch.equal(layer.M, torch.eye(41, **DOUBLE))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"scheme": "tucker"}, "one of spatial, channel, got 'tucker'", id="scheme"),
        pytest.param({"groups": 6}, "depthwise", id="depthwise"),
        pytest.param({"groups": 3, "out_channels": 7}, "out_channels must be divisible", id="groups-out"),
        pytest.param({"groups": 3, "in_channels": 7}, "in_channels must be divisible", id="groups-in"),
        pytest.param({"groups": 0}, "groups must be a positive integer", id="group-0"),
    ],
)
def test_options_that_it_cannot_hold_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FactorizedConv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, "rank": 2} | options)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_kernel_is_split_into_more_than_it_has(device):
    with pytest.raises(ValueError, match=r"rank must be in \[1, 9\], got 10"):
        FactorizedConv2d.from_dense(nn.Conv2d(3, 7, 3, device=device), 10, overcomplete=True)
