"""Tensorized convolutions and the maths of their cores, against kernels multiplied out by hand."""

from __future__ import annotations

import sys

import pytest
import tensorly
import torch
from conv_cases import DOUBLE
from tensorly.decomposition import partial_tucker, tensor_train
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_fnl.layers import TensorizedConv2d
from hf_fnl.math import tensors
from hf_fnl.surgery.config import TENSOR_SCHEMES

SHAPES = [(7, 3, 2, 5), (3, 11, 1, 1), (41, 2, 3, 1), (2, 37, 1, 3)]  # (out, in, height, width)

each_scheme = pytest.mark.parametrize("scheme", TENSOR_SCHEMES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


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
    single = [core.float() for core in cores]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(tensors.product(*single), kernel.float())


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
    assert layer.shape == shape
    assert TensorizedConv2d.parameter_count(shape, rank, scheme) == count


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
    for scheme in TENSOR_SCHEMES:
        assert not any(core.any() for core in tensors.decompose(torch.zeros(5, 3, 2, 2), 2, scheme))


def test_the_backend_of_tensorly_stays_what_it_was():
    with tensorly.backend_context("numpy"):
        tensors.decompose(torch.randn(5, 3, 2, 2), 2, "tt")
        assert tensorly.get_backend() == "numpy"


@each_scheme
def test_norm_and_decay_gradients_are_those_of_the_kernel(scheme):
    cores = [core.requires_grad_() for core in random_cores((7, 5, 2, 3), 4, scheme)]
    squared = kernel_by_hand(*cores).square().sum()
    assert_close(tensors.squared_frobenius_norm(*cores), squared)
    expected = torch.autograd.grad(squared / 2, cores)
    with torch.no_grad():
        assert_close(tensors.decay_gradients(*cores), expected)


@each_scheme
def test_the_norm_of_half_precision_cores_is_taken_in_float32(scheme):
    cores = [(8 * core).half() for core in random_cores((7, 5, 2, 3), 2, scheme)]
    squared = tensors.squared_frobenius_norm(*cores)
    assert squared.dtype == torch.float32
    assert squared > torch.finfo(torch.float16).max
    assert_close(squared, kernel_by_hand(*(core.double() for core in cores)).square().sum().float())
    assert {gradient.dtype for gradient in tensors.decay_gradients(*cores)} == {torch.float16}


@each_scheme
def test_the_cost_of_a_product_is_what_torch_counts(scheme):
    cores = random_cores((7, 5, 2, 3), 2, scheme)
    with FlopCounterMode(display=False) as counter:
        tensors.product(*cores)
    assert counter.get_total_flops() == 2 * tensors.product_cost(*(core.shape for core in cores))


@each_scheme
@each_shape
@pytest.mark.parametrize("rank", [2, 40])
def test_singular_values_are_those_of_the_kernel_as_a_matrix(shape, rank, scheme):
    cores = random_cores(shape, rank, scheme)
    values = tensors.singular_values(*cores)
    expected = torch.linalg.svdvals(kernel_by_hand(*cores).flatten(1))
    assert_close(values, expected[: len(values)], rtol=1e-7, atol=1e-6)
    assert not expected[len(values) :].gt(1e-9).any()


# Layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"scheme": "cp"}, "one of tt, tucker, got 'cp'", id="scheme"),
        pytest.param({"groups": 2}, "needs groups=1, got 2", id="groups"),
        pytest.param({"init": "spectral_ones"}, "must be spectral, default or he", id="ones"),
    ],
)
def test_options_that_it_cannot_hold_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TensorizedConv2d(6, 8, 3, 2, **options)


def test_only_decomposing_needs_tensorly(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorly", None)
    dense = nn.Conv2d(3, 7, 3)
    with pytest.raises(ImportError, match=r'by tensorly: pip install "hf_fnl\[tensor\]"'):
        TensorizedConv2d.from_dense(dense, 2)
    drawn = TensorizedConv2d(3, 7, 3, 2, init="default")
    TensorizedConv2d.empty_like(dense, 2).load_state_dict(drawn.state_dict())
