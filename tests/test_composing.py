"""Weights multiplied out for inference: which layers, that outputs stay, and that none goes stale."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_fnl.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, compose_

DOUBLE = {"dtype": torch.float64}
# Layers with whether their factors hold more numbers than their weight.
LAYERS = {
    "low": (lambda: FactorizedLinear(11, 17, 6, **DOUBLE), False),  # 168 of 187
    "high": (lambda: FactorizedLinear(11, 17, 7, **DOUBLE), True),  # 196
    "deep": (lambda: FactorizedLinear(11, 17, 6, deep=True, **DOUBLE), True),  # 204
    "overcomplete": (lambda: FactorizedLinear(11, 17, 29, overcomplete=True, bias=False, **DOUBLE), True),
    "low-conv": (lambda: FactorizedConv2d(11, 17, 3, 13, **DOUBLE), False),  # 1092 of 1683
    "high-conv": (lambda: FactorizedConv2d(11, 17, 3, 25, stride=2, padding=1, **DOUBLE), True),  # 2100
    "grouped-conv": (lambda: FactorizedConv2d(6, 10, 3, 9, groups=2, **DOUBLE), True),
    "embedding": (lambda: FactorizedEmbedding(17, 11, 11, **DOUBLE), False),
}


def _input(layer):
    if isinstance(layer, FactorizedEmbedding):
        return torch.arange(5)
    return torch.randn(*((3, layer.in_channels, 7, 5) if layer.kind == "conv" else (3, 5, 11)), **DOUBLE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("make", "composes"), LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_layers_with_more_numbers_in_their_factors_than_in_their_weight_are_multiplied_out(make, composes):
    layer = make().eval()
    x, names = _input(layer), list(layer.state_dict())
    expected = layer(x)
    with compose_(layer) as composed:
        assert composed.layers == ([layer] if composes else [])
        assert_close(layer(x), expected)
        assert list(layer.state_dict()) == names
        assert (layer.held_weight() is not None) == composes
    assert layer.held_weight() is None
    assert torch.equal(layer(x), expected)


def _changed(layer):
    with torch.no_grad():
        for factor in layer.factors():
            factor.mul_(2)
    return layer


CHANGES = {
    "training": lambda layer: _changed(layer.train()).eval(),
    "cast": lambda layer: layer.float().double(),
    "loaded": lambda layer: layer.load_state_dict(_changed(copy.deepcopy(layer)).state_dict()),
    "set": lambda layer: layer.set_factors_(tuple(2 * factor for factor in layer.factors())),
    "drawn-anew": lambda layer: layer.reset_parameters(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_layer_whose_factors_change_lets_go_of_its_weight(change):
    model = nn.Sequential(FactorizedLinear(11, 17, 29, overcomplete=True, **DOUBLE)).eval()
    x = torch.randn(3, 11, **DOUBLE)
    compose_(model)
    change(model[0])
    assert_close(model(x), nn.functional.linear(x, model[0].composed(), model[0].bias))


def test_gradients_go_to_the_factors():
    layer = FactorizedLinear(11, 17, 29, overcomplete=True, **DOUBLE).eval()
    compose_(layer)
    layer(torch.randn(3, 11, **DOUBLE)).sum().backward()
    assert all(factor.grad.abs().max() > 0 for factor in layer.factors())


def test_a_compiled_model_follows():
    torch.compiler.reset()
    model = nn.Sequential(FactorizedLinear(11, 17, 29, overcomplete=True, **DOUBLE)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 11, **DOUBLE)
    with torch.no_grad():
        for _ in range(2):
            with compose_(model):
                assert_close(compiled(x), model(x))
            _changed(model[0])
            assert_close(compiled(x), model(x))


def test_training_models_are_refused():
    with pytest.raises(ValueError, match=r"model\.eval"):
        compose_(nn.Sequential(FactorizedLinear(11, 17, 3)))
