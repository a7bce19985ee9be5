"""Frobenius decay in three modes, against products multiplied out, autograd and arithmetic by hand."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from accelerate import Accelerator
from flambe_cases import build
from gpt2_cases import CROSS_LM, LOW
from reference.products import decay_gradients, half_squared_norms
from torch import Tensor, nn
from torch.testing import assert_close

from hf_fnl.attention import Product, find_products
from hf_fnl.layers import FactorizedConv2d, FactorizedLinear, TensorizedConv2d
from hf_fnl.optim import Lamb, parameter_groups
from hf_fnl.optim.frobenius_decay import FrobeniusDecay, frobenius_penalty

WEIGHT_DECAY = 0.3


def two_factors() -> tuple[nn.Module, list[Product]]:
    model = nn.Sequential(nn.Linear(5, 7), FactorizedLinear(7, 5, 3)).double()
    return model, find_products(model, ["linear"])


def three_factors() -> tuple[nn.Module, list[Product]]:
    model = FactorizedLinear(7, 5, 3, deep=True).double()
    model.M.data = torch.randn(3, 3).double()
    return model, find_products(model, ["linear"])


def kernels() -> tuple[nn.Module, list[Product]]:
    model = nn.Sequential(FactorizedConv2d(3, 5, (2, 3), 4), FactorizedConv2d(5, 4, 3, 2, scheme="channel", deep=True))
    return model.double(), find_products(model, ["conv"])


def tensors() -> tuple[nn.Module, list[Product]]:
    layers = [TensorizedConv2d(5, 7, (2, 3), 4, scheme=scheme, init="default") for scheme in ("tt", "tucker")]
    model = nn.ModuleList(layers).double()
    return model, find_products(model, ["tensor"])


def cut_gpt2() -> tuple[nn.Module, list[Product]]:
    """Narrow heads whose factors share parameters, cross-attentions, and a tied table."""
    model = CROSS_LM.build(LOW).double()
    return model, find_products(model)


HEADS = {"stock-bert": ["qk", "ov"], "roberta": ["ov"], "llama": ["qk", "ov"], "gpt2": ["qk", "ov"], "phi3": ["ov"]}
MODELS = {name: functools.partial(build, name, kinds) for name, kinds in HEADS.items()}
MODELS |= {make.__name__: make for make in (cut_gpt2, two_factors, three_factors, kernels, tensors)}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def case(request) -> tuple[nn.Module, list[Product]]:
    """A model, with gradients, and its products."""
    torch.manual_seed(0)
    model, products = request.param()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, products


def groups_of(model: nn.Module, products: list[Product]) -> list[dict]:
    return parameter_groups(model, weight_decay=0.1, products=products, frobenius_decay=0.0)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_moved_to(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_penalty_is_the_norm_of_the_products(case):
    model, products = case
    decay = FrobeniusDecay(torch.optim.SGD(groups_of(model, products)), products, WEIGHT_DECAY, mode="penalty")
    expected = WEIGHT_DECAY * half_squared_norms(products, dict(model.named_parameters()))
    assert_close(decay.penalty(), expected)
    assert_close(frobenius_penalty(products, model, WEIGHT_DECAY), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(frobenius_penalty(products, dict(model.named_parameters()), WEIGHT_DECAY), expected)
        model.float()
        assert_close(frobenius_penalty(products, model, WEIGHT_DECAY), expected.float())


def test_coupled_equals_the_penalty_in_the_loss(case):
    coupled, products = case
    penalized = copy.deepcopy(coupled)
    for parameter, other in zip(coupled.parameters(), penalized.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    optimizer = Lamb(groups_of(coupled, products), lr=0.1)
    FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode="coupled")
    optimizer.step()
    frobenius_penalty(products, penalized, WEIGHT_DECAY).backward()
    Lamb(groups_of(penalized, products), lr=0.1).step()
    assert_moved_to(coupled, snapshot(penalized))


def test_decoupled_with_adamw(case):
    """The first step of Adam goes by the signs of the gradients."""
    model, products = case
    lr = {"factors": 0.05, "others": 0.1}
    decays = decay_gradients(products, dict(model.named_parameters()))
    expected = {
        name: (1 - lr["others"] * group["weight_decay"]) * p.detach() - lr["others"] * p.grad.sign()
        if name not in decays
        else p.detach() - lr["factors"] * (WEIGHT_DECAY * decays[name] + p.grad.sign())
        for group in groups_of(model, products)
        for name, p in group["params"]
    }
    groups = groups_of(model, products)
    groups[-1]["lr"] = lr["factors"]
    optimizer = torch.optim.AdamW(groups, lr=lr["others"], eps=0.0)
    FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode="decoupled")
    optimizer.step()
    assert_moved_to(model, expected)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_maximizing_optimizer_decays_as_one_that_minimizes_the_negative(mode):
    model, products = two_factors()
    other = copy.deepcopy(model)
    for each, sign in ((model, 1), (other, -1)):
        optimizer = torch.optim.SGD(groups_of(each, products), lr=0.1, maximize=sign < 0)
        FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode=mode)
        (sign * each(torch.ones(3, 5).double()).square().sum()).backward()
        optimizer.step()
    assert_moved_to(other, snapshot(model))


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients(mode, fused):
    """A fused optimizer divides them itself, and is called also where they overflow."""
    model, products = two_factors()
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    for each, scaled in ((other, False), (model, True)):
        optimizer = torch.optim.SGD(groups_of(each, products), lr=0.1, fused=fused)
        FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode=mode)
        loss = each(torch.ones(3, 5).double()).square().sum()
        (scaler.scale(loss) if scaled else loss).backward()
        scaler.step(optimizer) if scaled else optimizer.step()
    assert_moved_to(model, snapshot(other))
    scaler.update()
    model.get_parameter("1.U").grad.fill_(torch.inf)
    scaler.step(optimizer)
    assert_moved_to(model, snapshot(other))


def test_the_decay_of_what_accelerate_wrapped():
    model, products = two_factors()
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(groups_of(model, products)))
    assert FrobeniusDecay(optimizer, products, WEIGHT_DECAY).optimizer is optimizer.optimizer


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_a_factor_without_gradient_stays(mode):
    model, products = three_factors()
    before = snapshot(model)
    model.U.grad = torch.zeros_like(model.U)
    optimizer = torch.optim.SGD(groups_of(model, products), lr=0.1)
    FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode=mode)
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {"U"}
    assert model.V.grad is None


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_replaced_parameters_are_followed(mode):
    model, products = two_factors()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.SGD(groups_of(model, products), lr=0.1)
    FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode=mode)
    replaced = copy.deepcopy(model)
    for parameter, other in zip(model.parameters(), replaced.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    for group in optimizer.param_groups:
        group["params"] = [replaced.get_parameter(name) for name in group["param_names"]]
    before = snapshot(model)
    optimizer.step()
    assert_moved_to(model, before)

    expected = torch.optim.SGD(groups_of(model, products), lr=0.1)
    FrobeniusDecay(expected, products, WEIGHT_DECAY, mode=mode)
    expected.step()
    assert_moved_to(replaced, snapshot(model))


def test_a_copy_is_refused():
    model, products = two_factors()
    decay = FrobeniusDecay(torch.optim.SGD(groups_of(model, products), lr=0.1), products, WEIGHT_DECAY)
    with pytest.raises(TypeError, match="a FrobeniusDecay cannot be copied or saved: make another"):
        copy.deepcopy(decay)


def test_a_closure_is_refused_where_gradients_are_needed_before_it():
    model, products = two_factors()
    optimizer = torch.optim.SGD(groups_of(model, products), lr=0.1)
    with FrobeniusDecay(optimizer, products, WEIGHT_DECAY):
        optimizer.step(None)
        for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
            with pytest.raises(ValueError, match=r"mode='decoupled' needs the gradients before the step.*'penalty'"):
                call()
    with FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode="penalty"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("end", ["penalty", "remove", "with"])
def test_it_leaves_the_step_alone(end):
    model, products = two_factors()
    before = snapshot(model)
    optimizer = torch.optim.SGD(groups_of(model, products), lr=0.1)
    decay = FrobeniusDecay(optimizer, products, WEIGHT_DECAY, mode="penalty" if end == "penalty" else "coupled")
    if end == "remove":
        decay.remove()
    if end == "with":
        with decay:
            pass
    for name, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter) if "weight" not in name else None
    optimizer.step()
    assert_moved_to(model, before)


ORDINARY = r"product 1: its factor 1.U is .* group with weight_decay=0.1; pass frobenius_decay=0.0 to parameter_gr"


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (groups_of, {"mode": "l2"}, "mode of Frobenius decay must be one of penalty, coupled, decoupled, got 'l2'"),
        (
            groups_of,
            {"weight_decay": -0.1},
            "weight_decay of Frobenius decay must be finite and not negative, got -0.1",
        ),
        (groups_of, {"products": []}, r"there are no products to decay; find_products\(model\) lists those"),
        (lambda m, p: m.parameters(), {}, r"the parameters have none: build the optimizer from parameter_groups"),
        (lambda m, p: parameter_groups(m, weight_decay=0.1, products=p), {}, ORDINARY),
        (
            lambda m, p: [(name, q) for name, q in m.named_parameters() if name != "1.V"],
            {},
            r"product 1: its factor 1\.V is not among the optimizer's parameters",
        ),
    ],
    ids=["mode", "weight_decay", "products", "names", "ordinary-decay", "missing"],
)
def test_what_is_refused(params, options, message):
    model, products = two_factors()
    optimizer = torch.optim.SGD(params(model, products))
    with pytest.raises(ValueError, match=message):
        FrobeniusDecay(optimizer, **{"products": products, "weight_decay": WEIGHT_DECAY, **options})


def test_a_frozen_factor_and_a_penalty_of_nothing_are_refused():
    model, products = two_factors()
    optimizer = torch.optim.SGD(groups_of(model, products))
    model.get_parameter("1.V").requires_grad_(False)
    with pytest.raises(ValueError, match=r"product 1: its factor 1\.V is frozen"):
        FrobeniusDecay(optimizer, products, WEIGHT_DECAY)
    with pytest.raises(ValueError, match="a Frobenius penalty needs at least one product, got none"):
        frobenius_penalty([], model, WEIGHT_DECAY)
