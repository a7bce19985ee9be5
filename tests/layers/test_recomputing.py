"""What convolutions keep for the backward pass, and that computing it again changes no gradient."""

import copy
import itertools

import pytest
import torch
from conv_cases import DOUBLE, SCHEMES, factorized, images, randomized
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
WAYS = {"chain": False, "composed": True}
each_way = pytest.mark.parametrize("compose", WAYS.values(), ids=WAYS)


def kept_elements(layer, x):
    """Numbers that autograd keeps besides the input and the parameters, and the output."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().size() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    return sum(kept.values()), y


@each_scheme
@each_way
@pytest.mark.parametrize("rank", [2, 7])
def test_no_layer_with_fewer_parameters_keeps_more_than_the_dense_one(scheme, compose, rank):
    layer = factorized(scheme, 11, 13, 3, rank, padding=1, bias=False, compose=compose, init="default")
    fewer = 13 * 11 * 9 - sum(parameter.numel() for parameter in layer.parameters())
    assert fewer > 0
    for size in (2, 5, 17):
        assert kept_elements(layer, torch.randn(3, 11, size, size))[0] <= fewer


@each_scheme
@each_way
@pytest.mark.parametrize("casts", [False, True], ids=["float32", "autocast"])
def test_gradients_are_those_of_what_is_kept(scheme, compose, casts):
    layer = randomized(factorized(scheme, 6, 10, (3, 5), 4, stride=(1, 2), compose=compose, init="default"))
    x, results = images().float().requires_grad_(), []
    for layer.recompute in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            y = layer(x)
        results.append((y, *torch.autograd.grad(y.float().sin().sum(), [x, *layer.parameters()])))
    assert_close(*results)


@each_scheme
@each_way
def test_who_asks_for_it_keeps_all_or_nothing(scheme, compose):
    layer, x = factorized(scheme, 6, 10, 3, 4, compose=compose, init="default"), images().float()
    kept = {}
    for layer.recompute in (True, None, False):
        kept[layer.recompute] = kept_elements(layer, x)[0]
    assert kept[True] == 0 < kept[False]
    assert kept[None] in (kept[True], kept[False])


@pytest.mark.parametrize(("scheme", "compose"), [("spatial", False), ("channel", True), ("tucker", False)])
def test_second_derivatives_are_those_of_the_convolution(scheme, compose):
    layer = randomized(factorized(scheme, 3, 2, (2, 3), 2, compose=compose, init="default", **DOUBLE))
    x = torch.randn(2, 3, 4, 5, **DOUBLE, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(run, (x, *values), atol=1e-4)


def test_hooks_of_parameters_and_inputs_run_once():
    layer, seen = factorized("spatial", 6, 10, 3, 2, init="default"), []
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    for tensor in (x, *layer.parameters()):
        tensor.register_hook(lambda _: seen.append(1))
    layer(x).sum().backward()
    assert len(seen) == 4


def test_frozen_factors_get_no_gradients_and_inputs_need_none():
    layer = factorized("spatial", 6, 10, 3, 2, init="default")
    x = torch.randn(2, 6, 9, 9)
    layer(x).sum().backward()
    everything = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    layer.V.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.V.grad is None
    assert_close([layer.U.grad, layer.bias.grad], [everything[0], everything[2]])


def test_all_schemes_and_ways_compile_with_their_backward_pass_for_batches_of_all_sizes():
    torch.compiler.reset()
    layers = (
        factorized(scheme, 6, 6, 3, 2, padding=1, compose=compose, init="default")
        for scheme, compose in itertools.product(SCHEMES, (False, True))
    )
    model, graphs = nn.Sequential(*layers), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, backend=graphs)
    for count in (5, 8, 11):
        results, x = [], torch.randn(count, 6, 7, 13)
        for each in (model, compiled):
            y = each(x)
            results.append((y, torch.autograd.grad(y.sin().sum(), list(each.parameters()))))
        assert_close(*results, rtol=1e-3, atol=1e-4)
    assert graphs.frame_count == 1
