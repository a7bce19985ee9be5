"""FLAMBe against an oracle that multiplies every product out, and what it shares with LAMB."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from flambe_cases import CASES, build, groups_of, set_gradients
from reference.flambe import ReferenceFLAMBe
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from hf_fnl.attention import find_products
from hf_fnl.layers import FactorizedLinear, TensorizedConv2d
from hf_fnl.optim import FLAMBe, Lamb, lamb


@pytest.fixture(params=["together", "alone"])
def way(request, monkeypatch) -> None:
    """Both ways through the parameters: small ones together, and one after the other."""
    if request.param == "alone":
        monkeypatch.setattr(lamb, "_SMALL", 0)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        set_gradients(model, seed)
        optimizer.step()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


@pytest.mark.parametrize(("model", "kinds"), CASES)
@pytest.mark.usefixtures("way")
def test_equals_the_oracle(model, kinds):
    module, products = build(model, kinds)
    oracle = ReferenceFLAMBe(groups_of(module, products), products)
    optimizer = FLAMBe(groups_of(module, products), products=products)
    for seed in range(5):
        oracle.step(set_gradients(module, seed))
        optimizer.step()
        for name, parameter in module.named_parameters():
            assert_close(parameter.detach(), oracle.parameters[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.usefixtures("way")
def test_a_factor_without_gradient_stays_and_its_partners_move_as_ever():
    module, products = build("factorized", ["linear"])
    oracle = ReferenceFLAMBe(groups_of(module, products), products)
    optimizer = FLAMBe(groups_of(module, products), products=products)
    for seed, skipped in enumerate(("deep.M", "shallow.V", "deep.U")):
        gradients = set_gradients(module, seed)
        gradients[skipped] = module.get_parameter(skipped).grad = None
        oracle.step(gradients)
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert_close(parameter.detach(), oracle.parameters[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize(("model", "kinds"), [("stock-bert", ["ov", "qk"]), ("gpt2", ["ov"])])
@pytest.mark.usefixtures("way")
def test_without_decay_it_is_lamb(model, kinds):
    ours, products = build(model, kinds, torch.float32)
    theirs, _ = build(model, kinds, torch.float32)
    train(FLAMBe(groups_of(ours, products, weight_decay=0.0), products=products), ours, range(3))
    train(Lamb(groups_of(theirs, products, weight_decay=0.0)), theirs, range(3))
    assert_same(ours, theirs)


def test_replaced_parameters_are_followed():
    """As under FSDP, where accelerate puts other parameters into the groups after the optimizer was built."""
    ours, products = build("stock-bert", ["ov"])
    theirs, _ = build("stock-bert", ["ov"])
    optimizer = FLAMBe(groups_of(ours, products), products=products)
    replaced = copy.deepcopy(ours)
    for parameter in ours.parameters():
        parameter.data = parameter.data * float("nan")
    for group in optimizer.param_groups:
        group["params"] = [replaced.get_parameter(name) for name in group["param_names"]]
    train(optimizer, replaced, range(2))
    train(FLAMBe(groups_of(theirs, products), products=products), theirs, range(2))
    assert_same(replaced, theirs)


def test_bfloat16_stays_close():
    module, products = build("stock-bert", ["ov"], torch.bfloat16)
    exact = copy.deepcopy(module).double()
    oracle = ReferenceFLAMBe(groups_of(exact, products), products)
    optimizer = FLAMBe(groups_of(module, products), products=products)
    for seed in range(3):
        gradients = set_gradients(module, seed)
        oracle.step({name: gradient.double() for name, gradient in gradients.items()})
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert_close(parameter.detach().double(), oracle.parameters[name], rtol=3e-2, atol=3e-2, msg=name)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_no_factor_moves_as_in_lamb(name):
    """Also where it shares a parameter with a factor, but for the trust ratio, which is the whole parameter's."""
    module, products = build(name, ["ov"])
    plain = copy.deepcopy(module)
    before = copy.deepcopy(module)
    train(FLAMBe(module.named_parameters(), products=products, weight_decay=0.3), module, range(1))
    train(Lamb(plain.named_parameters(), weight_decay=0.3), plain, range(1))
    factors = {name for product in products for name in product.parameter_names}
    for name, parameter in module.named_parameters():
        theirs, start = plain.get_parameter(name), before.get_parameter(name)
        if name not in factors:
            assert torch.equal(parameter, theirs), name
        elif "c_attn" in name:
            moved, expected = (p.detach()[:, :30] - start.detach()[:, :30] for p in (parameter, theirs))
            ratio = (moved.norm() / expected.norm()).item()
            assert ratio != pytest.approx(1)
            assert_close(moved, ratio * expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["stock-bert", "llama", "gpt2"])
def test_a_step_on_a_gpu_never_waits_for_it(model):
    """Fake tensors have no values, so reading one, by ``.item()`` or by a branch, is an error."""
    module, products = build(model, ["ov"])
    with FakeTensorMode():
        named = {name: nn.Parameter(torch.empty(p.shape, device="cuda")) for name, p in module.named_parameters()}
        for parameter in named.values():
            parameter.grad = torch.empty_like(parameter)
        FLAMBe(named.items(), products=products).step()


OV = "bert.encoder.layer.1.attention.ov"
VALUE = "bert.encoder.layer.1.attention.self.value.weight"


def test_tensors():
    model = nn.Sequential(TensorizedConv2d(3, 5, 2, 2, init="default"), FactorizedLinear(5, 7, 3))
    with pytest.raises(ValueError, match="and 0 are tensors; use Lamb or another optimizer with FrobeniusDecay"):
        FLAMBe(model.named_parameters(), products=find_products(model))


def test_factors_with_different_decay():
    module, products = build("stock-bert", ["ov"])
    rest = [(name, parameter) for name, parameter in module.named_parameters() if name != VALUE]
    groups = [{"params": rest}, {"params": [(VALUE, module.get_parameter(VALUE))], "weight_decay": 0.5}]
    with pytest.raises(ValueError, match=rf"product {OV}: its factors have different weight_decay \({VALUE}: 0.5, "):
        FLAMBe(groups, products=products)


def test_a_section_of_two_products():
    module, products = build("gpt2", ["ov", "qk"])
    again = dataclasses.replace(products[1], name="again", places=(products[0].places[0],))
    message = r"product again: its factor h.0.attn.c_attn.weight belongs to more than one product"
    with pytest.raises(ValueError, match=message):
        FLAMBe(module.named_parameters(), products=[*products, again])
