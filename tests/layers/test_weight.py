"""`layer.weight` of a factorized layer: read like a parameter, never written."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import Function, gradgradcheck
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import initialization
from transformers.pytorch_utils import Conv1D

from hf_fnl import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from hf_fnl.layers import TensorizedConv2d

DOUBLE = {"dtype": torch.float64}
LAYERS = {
    "linear": lambda: FactorizedLinear(5, 7, 3, **DOUBLE),
    "conv1d": lambda: FactorizedLinear.from_dense(Conv1D(7, 5).double(), 3),
    "embedding": lambda: FactorizedEmbedding(7, 5, 3, **DOUBLE),
    "channel-deep": lambda: FactorizedConv2d(4, 6, 3, 2, scheme="channel", deep=True, **DOUBLE),
    "grouped": lambda: FactorizedConv2d(4, 6, 3, 2, groups=2, **DOUBLE),
    "tucker": lambda: TensorizedConv2d(4, 6, 3, 2, scheme="tucker", init="default", **DOUBLE),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def linear() -> FactorizedLinear:
    return FactorizedLinear(5, 7, 3)


# What would write

ZEROS = torch.zeros(7, 5)
WRITES = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(ZEROS),
    "add_": lambda w: w.add_(1),
    "masked_fill_": lambda w: w.masked_fill_(ZEROS == 0, 1.0),
    "index_copy_": lambda w: w.index_copy_(0, torch.tensor([1]), ZEROS[:1]),
    "clamp_": lambda w: w.clamp_(0),
    "relu": lambda w: F.relu(w, inplace=True),
    "setitem": lambda w: w.__setitem__(1, 0.0),
    "set_": lambda w: w.set_(torch.zeros(7, 5)),
    "out": lambda w: torch.mul(ZEROS, 2, out=w),
    "foreach": lambda w: torch._foreach_mul_([torch.ones(2), w], 2.0),
    "normal_": nn.init.normal_,
    "orthogonal_": nn.init.orthogonal_,
    "trunc_normal_": nn.init.trunc_normal_,
    "eye_": nn.init.eye_,
    "apply_": lambda w: w.apply_(lambda x: 0.0),
    "renorm": lambda w: F.embedding(torch.tensor([1]), w, max_norm=1e-3),
    "data": lambda w: setattr(w, "data", torch.zeros(7, 5)),
    "vector_to_parameters": lambda w: nn.utils.vector_to_parameters(torch.zeros(35), [w]),
    "dlpack": torch.from_dlpack,
    "storage": lambda w: w.untyped_storage(),
}
VIEWS = {
    "itself": lambda w: w,
    "data": lambda w: w.data,
    "detached": lambda w: w.detach(),
    "same-dtype": lambda w: w.to(w.dtype).contiguous(),
    "alias": lambda w: w.view_as(w).expand(7, 5).reshape(7, 5)[:],
    "transposed-twice": lambda w: w.data.mT.mT,
    "split": lambda w: w.data.split(7)[0],
}


@pytest.mark.parametrize(
    ("write", "view"),
    [(write, "itself") for write in WRITES] + [("zero_", view) for view in VIEWS] + [("data", "data")],
)
def test_a_write_raises_and_changes_nothing(write, view):
    layer, write, view = linear(), WRITES[write], VIEWS[view]
    before = copy.deepcopy(layer.state_dict())
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(RuntimeError, match=r"FactorizedLinear, which holds only its factors \(U, V\)"):
            write(view(layer.weight))
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert set(layer._parameters) == {"U", "V", "M", "bias"}


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w[1].fill_(0),
        lambda w: w.T.add_(1),
        lambda w: w.select(1, 2).zero_(),
        lambda w: w.flatten()[3:].zero_(),
        lambda w: w.diagonal().zero_(),
        lambda w: w.unbind()[0].zero_(),
        lambda w: w.real.zero_(),
        lambda w: w.view(torch.int32).zero_(),
        lambda w: w.as_strided((2,), (1,)).zero_(),
        lambda w: setattr(w, "grad", torch.zeros(7, 5)),
        lambda w: w.register_hook(lambda gradient: gradient),
        lambda w: w.share_memory_(),
    ],
)
def test_a_write_raises_where_gradients_are_on(write):
    layer = linear()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError):
        write(layer.weight)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@each_layer
def test_nothing_takes_the_place_of_the_weight(make):
    layer = make()
    for value in (nn.Parameter(layer.weight.detach().clone()), layer.weight + 1, None):
        with pytest.raises(RuntimeError, match=rf"layer.weight = .* {type(layer).__name__}, which holds only"):
            layer.weight = value
    with pytest.raises(RuntimeError, match="aten"):
        layer.weight += 1
    with pytest.raises(RuntimeError, match="aten"):
        layer.weight.data += 1
    for parametrize in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        with pytest.raises(ValueError, match="does not have a parameter"):
            parametrize(layer)
    assert "weight" not in dict(layer.named_parameters())


def test_arrays_of_it_are_read_only():
    weight = linear().weight
    for array in (weight.detach().numpy(), np.asarray(weight.detach()), weight.detach()[1].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    with pytest.raises(RuntimeError, match=r"detach\(\)"):
        weight.numpy()


def test_what_is_cloned_or_computed_is_the_callers_own():
    layer = linear()
    for own in (layer.weight.clone(), layer.weight * 1, layer.weight.double(), copy.deepcopy(layer.weight)):
        assert type(own) is torch.Tensor
        own.detach().zero_()
    parameter = nn.Parameter(layer.weight.detach().clone())
    assert type(parameter) is nn.Parameter
    parameter.data.zero_()
    assert layer.dense_weight().any()


def test_transformers_initialization_passes_it_by():
    layer = linear()
    before = layer.dense_weight()
    initialization.normal_(layer.weight)
    assert_close(layer.dense_weight(), before, rtol=0, atol=0)


# Freezing reaches the factors


@each_layer
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_requires_grad_is_that_of_the_factors(make, context):
    layer = make()
    with context():
        assert layer.weight.requires_grad
        layer.weight.requires_grad_(False)
        assert not layer.weight.requires_grad
        assert not any(factor.requires_grad for factor in layer.factors())
        layer.weight.requires_grad = True
        assert layer.weight.requires_grad
        assert all(factor.requires_grad for factor in layer.factors())
        leaf = layer.weight.detach().requires_grad_()  # of a tensor of its own
        layer.weight.detach().requires_grad_(False)
    assert all(factor.requires_grad for factor in layer.factors())
    leaf.sum().backward()
    assert_close(leaf.grad, torch.ones_like(layer.dense_weight()))


# What reads


@each_layer
def test_it_is_described_without_a_product_and_read_as_the_dense_weight(make, monkeypatch):
    layer = make()
    dense = layer.dense_weight()
    with monkeypatch.context() as patch:
        patch.setattr(type(layer), "weight_from", lambda self, *factors: pytest.fail("multiplied"))
        for weight in (layer.weight, layer.weight.data):
            assert (weight.shape, weight.dtype, weight.device) == (dense.shape, dense.dtype, dense.device)
            assert (weight.ndim, weight.numel(), weight.is_meta) == (dense.ndim, dense.numel(), False)
            assert weight.is_contiguous()
    assert_close(layer.weight + 0, dense)
    assert_close(layer.weight[1:].mT + 0, dense[1:].mT)
    assert layer.weight.tolist() == dense.tolist()
    assert f"{layer.weight}" == repr(layer.weight)
    with torch.inference_mode():
        assert_close(layer.weight + 0, dense)
    assert (copy.deepcopy(layer).to("meta").weight + 0).is_meta


@each_layer
def test_it_is_saved_as_a_tensor(make):
    layer, buffer = make(), io.BytesIO()
    torch.save({"weight": layer.weight}, buffer)
    buffer.seek(0)
    for weight in (torch.load(buffer)["weight"], pickle.loads(pickle.dumps(layer.weight))):
        assert type(weight) is torch.Tensor
        assert_close(weight, layer.dense_weight())


class Sine(Function):
    """Keeps its input for the backward pass, as fused losses do."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.sin()

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient * weight.cos()


READERS = {
    "operation": lambda w: w.sin().sum(),
    "function": lambda w: Sine.apply(w).sum(),
    "view": lambda w: w.flatten()[1:].sin().sum() + w.flatten()[0].sin(),
    "checkpoint": lambda w: torch.utils.checkpoint.checkpoint(lambda: w.sin().sum(), use_reentrant=False),
    "compiled": torch.compile(lambda w: w.sin().sum(), backend="aot_eager"),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # by the compiler, for any input that is not a leaf
@pytest.mark.parametrize(
    ("make", "read"), [("linear", read) for read in READERS] + [(make, "function") for make in LAYERS]
)
def test_gradients_reach_the_factors_from_whatever_reads(make, read):
    layer, read = LAYERS[make](), READERS[read]
    torch._dynamo.reset()
    found = torch.autograd.grad(read(layer.weight), layer.factors())
    assert_close(found, torch.autograd.grad(layer.dense_weight().sin().sum(), layer.factors()))


@each_layer
def test_gradients_of_gradients(make):
    layer = make()
    assert gradgradcheck(lambda *factors: layer.weight.sin().sum(), layer.factors())


class Reader(nn.Module):
    """Returns a number that depends on the weight of its layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self):
        return self.layer.weight.sin().sum()


def test_the_gradient_of_a_function_of_the_parameters():
    layer = LAYERS["channel-deep"]()
    parameters = {name: parameter.detach() for name, parameter in Reader(layer).named_parameters()}
    found = grad(lambda parameters: functional_call(Reader(layer), parameters))(parameters)
    expected = torch.autograd.grad(layer.dense_weight().sin().sum(), layer.factors())
    assert_close([found[f"layer.{name}"] for name in ("U", "M", "V")], list(expected))


@each_layer
def test_compiled_and_exported_code_reads_it(make):
    reader = Reader(make())
    torch._dynamo.reset()
    compiled = torch.compile(reader, backend="aot_eager", fullgraph=True)
    assert_close(compiled(), reader())
    assert_close(torch.export.export(reader, ()).module()(), reader())


@pytest.mark.parametrize("make", [LAYERS["linear"], LAYERS["tucker"]], ids=["linear", "tucker"])
def test_automatic_casts_cast_the_weight_and_not_its_factors(make):
    layer = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer.weight + 0, layer.dense_weight().float(), rtol=0.02, atol=0.02)
        assert (layer.weight + 0).dtype == torch.float32
        rows = layer.weight.flatten(1)
        assert (rows @ torch.ones(rows.shape[1], 2)).dtype == torch.bfloat16
    assert_close(layer.weight + 0, layer.dense_weight())


def test_weights_of_one_pair_of_factors_have_one_address_and_others_another():
    layer, other = FactorizedLinear.from_dense(Conv1D(5, 5), 3), FactorizedLinear(5, 5, 3)
    transposed, tied = FactorizedLinear(5, 5, 3), FactorizedLinear.from_dense(Conv1D(5, 5), 3)
    for each in (transposed, tied):
        each.U, each.V = layer.U, layer.V
    weights = [each.weight for each in (layer, tied, transposed, other)]
    addresses = [weight.data_ptr() for weight in weights]
    assert addresses[0] == addresses[1] == layer.weight.data_ptr()
    assert len(set(addresses)) == 3


# In parts


def test_factors_that_fsdp_divides_are_read_and_not_written(mesh):
    layer = linear()
    dense = layer.dense_weight().detach()
    fully_shard(layer, mesh=mesh)
    assert isinstance(layer.U, DTensor)
    assert (layer.weight.shape, layer.weight.dtype) == (dense.shape, dense.dtype)
    assert_close((layer.weight + 0).full_tensor(), dense)
    (2 * layer.weight).sum().backward()
    assert layer.U.grad.full_tensor().any()
    with torch.no_grad(), pytest.raises(RuntimeError, match="holds only its factors"):
        layer.weight.zero_()
    layer.weight.requires_grad_(False)
    assert not layer.V.requires_grad
