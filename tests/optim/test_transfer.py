"""Optimizer state that goes from weights to their factors: equal to that of the factors' own gradients."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from low_rank_cases import GPT2_LAYERS, tiny_gpt2
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_fnl import FactorizationConfig, FLAMBe, Lamb, factorize_, find_products, parameter_groups
from hf_fnl.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from hf_fnl.optim.transfer import factor_states, transfer_

LAYERS = {
    "linear": (lambda: FactorizedLinear.from_dense(nn.Linear(7, 5), 3), (4, 7)),
    "full rank": (lambda: FactorizedLinear.from_dense(nn.Linear(7, 5), 5), (4, 7)),
    "deep": (lambda: FactorizedLinear(7, 5, 3, deep=True), (4, 7)),
    "Conv1D": (lambda: FactorizedLinear.from_dense(Conv1D(5, 7), 3), (4, 7)),
    "embedding": (lambda: FactorizedEmbedding.from_dense(nn.Embedding(11, 5), 3), (4, 2)),
    "spatial": (lambda: FactorizedConv2d.from_dense(nn.Conv2d(4, 6, (3, 5)), 7, scheme="spatial"), (2, 4, 9, 8)),
    "channel": (
        lambda: FactorizedConv2d.from_dense(nn.Conv2d(4, 6, (3, 5), groups=2), 5, scheme="channel"),
        (2, 4, 9, 8),
    ),
}
OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "sgd without momentum": functools.partial(torch.optim.SGD, lr=0.1),
    "lamb": functools.partial(Lamb, lr=0.01),
}


def layer_and_input(case: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer = make()
    inputs = torch.randint(11, shape) if case == "embedding" else torch.randn(shape)
    return layer, inputs


@pytest.mark.parametrize("case", LAYERS)
def test_first_moments_are_those_of_the_factors_gradients(case):
    layer, inputs = layer_and_input(case)
    dense = layer.to_dense()
    for module in (layer, dense):
        module(inputs).sin().sum().backward()
    states = factor_states(layer, {"exp_avg": dense.weight.grad, "momentum_buffer": 2 * dense.weight.grad})
    assert list(states) == list(layer.factors())
    for factor, state in states.items():
        torch.testing.assert_close(state["exp_avg"], factor.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state["momentum_buffer"], 2 * factor.grad, rtol=1e-4, atol=1e-5)
        assert state["exp_avg"].is_contiguous()


@pytest.mark.parametrize("case", LAYERS)
def test_second_moments_are_exact_for_a_gradient_of_one_entry(case):
    layer, _ = layer_and_input(case)
    gradient = torch.zeros(layer.dense_shape)
    gradient.view(-1)[13] = -1.7
    states = factor_states(layer, {"exp_avg": gradient, "exp_avg_sq": gradient**2, "max_exp_avg_sq": 2 * gradient**2})
    for factor, state in states.items():
        if factor is layer.M:  # exact up to what the identity hides
            continue
        torch.testing.assert_close(state["exp_avg_sq"], state["exp_avg"] ** 2)
        torch.testing.assert_close(state["max_exp_avg_sq"], 2 * state["exp_avg"] ** 2)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(11, 7, generator=torch.Generator().manual_seed(step))
        model(inputs).square().sum().backward()
        optimizer.step()


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_every_optimizer_goes_on_with_what_it_knew(case):
    model = net()
    optimizer = OPTIMIZERS[case](parameter_groups(model, weight_decay=0.1))
    train(model, optimizer, 3)
    before, known = named(model), copy.copy(optimizer.state)
    factorize_(model, FactorizationConfig(rank=3, include=["0"]))
    transfer_(optimizer, before, model)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.U", "0.V", "2.weight"],
        ["0.bias", "2.bias"],
    ]
    assert [p for group in optimizer.param_groups for p in group["params"]] == [
        model.get_parameter(name) for group in optimizer.param_groups for name in group["param_names"]
    ]
    for name in ("2.weight", "0.bias", "2.bias"):
        assert optimizer.state[before[name]] == known.get(before[name], {})
    expected = factor_states(model[0], known.get(before["0.weight"], {}))
    for factor, state in expected.items():
        assert optimizer.state[factor].keys() == state.keys() == known.get(before["0.weight"], {}).keys()
        for key, value in state.items():
            assert torch.equal(optimizer.state[factor][key], value)
    assert before["0.weight"] not in optimizer.state
    train(model, optimizer, 1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_step_at_full_rank_moves_the_product_by_the_gradient_seen_through_the_factors():
    model, lr = net(), 0.05
    optimizer = torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9)
    train(model, optimizer, 2)
    before = named(model)
    M = optimizer.state[before["2.weight"]]["momentum_buffer"].clone()
    factorize_(model, FactorizationConfig(rank=5, include=["2"]))
    transfer_(optimizer, before, model)
    U, V, W = model[2].U.detach().clone(), model[2].V.detach().clone(), before["2.weight"].detach()
    twin = copy.deepcopy(model)
    twin[2] = twin[2].to_dense()
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), 1)
    B = 0.9 * M + twin[2].weight.grad
    train(model, optimizer, 1)
    expected = W - lr * (B @ V @ V.mT + U @ U.mT @ B) + lr**2 * B @ V @ U.mT @ B
    torch.testing.assert_close(model[2].composed(), expected, rtol=1e-4, atol=1e-5)


def test_flambe_takes_over_what_lamb_knew():
    model = net()
    lamb = Lamb(parameter_groups(model, weight_decay=0.1))
    train(model, lamb, 3)
    before = named(model)
    factorize_(model, FactorizationConfig(rank=3))
    products = find_products(model)
    flambe = FLAMBe(parameter_groups(model, weight_decay=0.1, products=products), products=products)
    transfer_(lamb, before, model, target=flambe)
    expected = factor_states(model[0], lamb.state[before["0.weight"]])
    assert torch.equal(flambe.state[model[0].U]["exp_avg"], expected[model[0].U]["exp_avg"])
    assert flambe.state[model[0].bias] == lamb.state[before["0.bias"]]
    assert set(lamb.state) == set(before.values())
    train(model, flambe, 1)
    assert flambe.state[model[0].U]["step"] == 4


def test_tied_weights_are_followed_once_and_groups_without_names_keep_their_order():
    model = tiny_gpt2(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(12).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    before = named(model)
    factorize_(model, FactorizationConfig(rank=5, kinds=["linear", "embedding"]))
    transfer_(optimizer, before, model)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert set(optimizer.state) == set(model.parameters())
    assert model.lm_head.U is model.transformer.wte.U


def test_a_parameter_of_another_shape_starts_afresh():
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    train(model, optimizer, 1)
    before = named(model)
    model[0], model[2] = nn.Linear(7, 3), nn.Linear(3, 5)
    transfer_(optimizer, before, model)
    assert list(optimizer.state) == [model[2].bias]
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


def test_state_of_unknown_meaning_is_dropped_with_a_warning():
    model = net()
    optimizer = torch.optim.RMSprop(model.named_parameters())
    train(model, optimizer, 1)
    before = named(model)
    factorize_(model, FactorizationConfig(rank=3, include=["0"]))
    with pytest.warns(UserWarning, match="the state square_avg of the optimizer has no known counterpart"):
        transfer_(optimizer, before, model)
    assert set(optimizer.state) == {model[0].bias, model[2].weight, model[2].bias}
    train(model, optimizer, 1)


def test_a_parameter_from_nowhere_needs_a_target():
    model = net()
    optimizer = torch.optim.AdamW(model.named_parameters())
    before = named(model)
    model.append(nn.Linear(5, 2))
    with pytest.raises(
        ValueError, match=r"3\.weight comes from no parameter that the optimizer has; pass .* as target"
    ):
        transfer_(optimizer, before, model)
    assert list(optimizer.param_groups[0]["params"]) == list(before.values())


def test_frozen_weights_are_passed_over():
    model = tiny_gpt2(dropout=0.0)
    model.transformer.h[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1))
    before = named(model)
    factorize_(model, GPT2_LAYERS)
    transfer_(optimizer, before, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(trained)
