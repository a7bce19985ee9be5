"""LAMB and FLAMBe refuse, before anything moves, a state or a gradient that does not fit its parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from hf_fnl import FactorizedLinear, FLAMBe, FrobeniusDecay, Lamb, find_products, parameter_groups


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 5), FactorizedLinear(5, 11, 3), nn.Linear(11, 3))


def run_back(model: nn.Module) -> None:
    model.zero_grad()
    first = next(model.parameters())
    model(torch.randn(2, 7, dtype=first.dtype, device=first.device)).square().sum().backward()


def flambe(model: nn.Module, **options: Any) -> FLAMBe:
    return FLAMBe(model.named_parameters(), products=find_products(model, ["linear"]), **options)


def lamb(model: nn.Module, **options: Any) -> Lamb:
    return Lamb(model.named_parameters(), **options)


OPTIMIZERS = {"lamb": lamb, "flambe": flambe}


Snapshot = dict[str, Any]


def snapshot(model: nn.Module, optimizer: Lamb, but: str = "") -> Snapshot:
    """Values and states of all parameters but one."""
    return {
        name: (parameter.detach().clone(), copy.deepcopy(optimizer.state.get(parameter, {})))
        for name, parameter in model.named_parameters()
        if name != but
    }


def assert_unmoved(model: nn.Module, optimizer: Lamb, before: Snapshot) -> None:
    """Bit for bit: nothing may have been written."""
    parameters = dict(model.named_parameters())
    for name, (value, state) in before.items():
        assert torch.equal(parameters[name], value)
        now = optimizer.state.get(parameters[name], {})
        assert now.keys() == state.keys()
        for key, kept in state.items():
            assert torch.equal(now[key], kept)


def replace(key: str, change: Callable[[Any], Any]) -> Callable[[nn.Parameter, dict[str, Any]], None]:
    def harm(parameter: nn.Parameter, state: dict[str, Any]) -> None:
        state[key] = change(state[key])

    return harm


def new_data(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Parameter, dict[str, Any]], None]:
    """Data of another form, with a gradient that fits them."""

    def harm(parameter: nn.Parameter, state: dict[str, Any]) -> None:
        parameter.grad = None
        parameter.data = change(parameter.data)
        parameter.grad = torch.ones_like(parameter)

    return harm


def remove(key: str) -> Callable[[nn.Parameter, dict[str, Any]], None]:
    return lambda parameter, state: state.pop(key)


def other_gradient(parameter: nn.Parameter, state: dict[str, Any]) -> None:
    parameter.grad_dtype = None
    parameter.grad = torch.ones_like(parameter, dtype=torch.float64)


def stale_gradient(parameter: nn.Parameter, state: dict[str, Any]) -> None:
    parameter.data = torch.zeros(2, 2)
    state.clear()


HARMS: dict[str, tuple[Callable[[nn.Parameter, dict[str, Any]], None], str]] = {
    "moment-of-another-shape": (replace("exp_avg", lambda x: x.new_zeros(2, 2)), r"exp_avg of .* \(2, 2\)"),
    "moment-in-other-order": (replace("exp_avg", lambda x: x.mT.contiguous().mT), "exp_avg of .*contiguous"),
    "moment-in-float64": (replace("exp_avg", Tensor.double), r"exp_avg of .*torch.float64"),
    "moment-missing": (remove("exp_avg_sq"), r"the state of .* holds step, exp_avg, and"),
    "step-a-number": (replace("step", int), "step of .* is 1 of type int"),
    "parameter-in-float64": (new_data(Tensor.double), r"exp_avg of .*torch.float64"),
    "gradient-in-float64": (other_gradient, "the gradient of .*torch.float64"),
    "gradient-of-another-shape": (stale_gradient, r"the gradient of .*\(3, 11\).*\(2, 2\)"),
}


@pytest.mark.parametrize(("harm", "message"), HARMS.values(), ids=HARMS)
def test_what_does_not_fit_is_named_and_nothing_moves(harm, message):
    model = network()
    ours = flambe(model)
    run_back(model)
    ours.step()
    before = snapshot(model, ours, but="2.weight")
    harm(model[2].weight, ours.state[model[2].weight])  # one of the last, so that others would have moved
    with pytest.raises(ValueError, match=message) as caught:
        ours.step()
    assert "2.weight" in str(caught.value)
    assert_unmoved(model, ours, before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_cast_model_is_refused_until_its_state_is_cast(dtype, optimizer):
    model = network()
    ours = optimizer(model, lr=0.1)
    run_back(model)
    ours.step()
    model.to(dtype)
    run_back(model)
    before = snapshot(model, ours)
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight is torch.float32.*load_state_dict"):
        ours.step()
    assert_unmoved(model, ours, before)

    ours.load_state_dict(ours.state_dict())
    again = copy.deepcopy(model)
    expected = optimizer(again, lr=0.1)
    expected.load_state_dict(copy.deepcopy(ours.state_dict()))
    for parameter, other in zip(model.parameters(), again.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    ours.step()
    expected.step()
    tolerance = 4 * torch.finfo(model[0].weight.dtype).eps
    assert_close(dict(model.named_parameters()), dict(again.named_parameters()), rtol=tolerance, atol=tolerance)


def after_a_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    run_back(model)
    optimizer.step()
    return optimizer.state_dict()


def of_another_model(model: nn.Module) -> dict[str, Any]:
    wider = nn.Sequential(nn.Linear(7, 6), FactorizedLinear(6, 11, 3), nn.Linear(11, 3))
    return after_a_step(flambe(wider), wider)


def with_numbers_for_steps(model: nn.Module) -> dict[str, Any]:
    state = after_a_step(flambe(model), model)
    return {**state, "state": {i: {**values, "step": int(values["step"])} for i, values in state["state"].items()}}


FOREIGN: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], str]] = {
    "another-model": (of_another_model, r"exp_avg of 0\.weight is .*\(6, 7\).*\(5, 7\)"),
    "another-order": (
        lambda model: Lamb(reversed(list(model.named_parameters()))).state_dict(),
        "2.bias in the place of 0.weight",
    ),
    "sgd": (
        lambda model: after_a_step(torch.optim.SGD(model.named_parameters(), momentum=0.9), model),
        "needs betas, eps",
    ),
    "amsgrad": (
        lambda model: after_a_step(torch.optim.AdamW(model.named_parameters(), amsgrad=True), model),
        r"the state of 0\.weight holds .*max_exp_avg_sq",
    ),
    "steps-as-numbers": (with_numbers_for_steps, r"step of 0\.weight is 1 of type int"),
    "other-groups": (
        lambda model: Lamb(parameter_groups(model, weight_decay=0.1)).state_dict(),
        "different number of parameter groups",
    ),
}


@pytest.mark.parametrize(("state", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_state_is_refused_when_it_is_loaded(state, message):
    model = network()
    foreign, ours = state(copy.deepcopy(model)), flambe(model)
    run_back(model)
    ours.step()
    before, groups = snapshot(model, ours), copy.deepcopy(ours.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        ours.load_state_dict(foreign)
    assert_unmoved(model, ours, before)
    assert ours.state_dict()["param_groups"] == groups
    ours.step()


@pytest.mark.parametrize("named", [True, False])
def test_parameters_without_names_are_counted(named):
    groups = [nn.Linear(3, 2), nn.Linear(2, 5)]
    params = [
        {"params": [(f"{i}.{name}", p) if named else p for name, p in group.named_parameters()]}
        for i, group in enumerate(groups)
    ]
    optimizer = Lamb(params)
    for group in groups:
        group(torch.randn(2, group.in_features)).sum().backward()
    optimizer.step()
    optimizer.state[groups[1].bias]["exp_avg"] = torch.zeros(9)
    with pytest.raises(ValueError, match=r"exp_avg of 1\.bias" if named else "exp_avg of parameter 1 of group 1"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_numbers_that_lamb_cannot_update_are_refused(dtype):
    parameter, other = nn.Parameter(torch.ones(3, 2).to(dtype)), nn.Parameter(torch.ones(3))
    parameter.grad, other.grad = torch.ones(3, 2).to(dtype), torch.ones(3)
    with pytest.raises(ValueError, match=f"weight is of {dtype}"):
        Lamb([("bias", other), ("weight", parameter)]).step()
    assert torch.equal(other, torch.ones(3))


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
def test_frobenius_decay_does_not_move_what_lamb_refuses(mode):
    model = network()
    products = find_products(model, ["linear"])
    optimizer = Lamb(parameter_groups(model, weight_decay=0.1, products=products, frobenius_decay=0.0))
    FrobeniusDecay(optimizer, products, 0.1, mode=mode)
    run_back(model)
    optimizer.step()
    optimizer.state[model[0].weight]["exp_avg"] = torch.zeros(2)
    run_back(model)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"exp_avg of 0\.weight"):
        optimizer.step()
    assert_unmoved(model, optimizer, before)
