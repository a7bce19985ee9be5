r"""What a step of SGD on factors does to their product (Kamalakara et al. 2022, Eq. 1; Khodak et al. 2021, Claim 3.1).

Both papers state it up to terms of second order in the rate, so halving the rate has to quarter what is left.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hf_fnl.layers import FactorizedConv2d, FactorizedLinear
from hf_fnl.layers.base import FactorizedMatrix

DOUBLE = {"dtype": torch.float64}
LAYERS = {
    "linear": (lambda: FactorizedLinear(7, 5, 3, False, **DOUBLE), (11, 7)),
    "spatial": (lambda: FactorizedConv2d(4, 6, 3, 5, padding=1, groups=2, bias=False, **DOUBLE), (3, 4, 5, 7)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
Loss = Callable[[Tensor], Tensor]


def smooth(outputs: Tensor) -> Tensor:
    return outputs.sin().sum()


def normalized(outputs: Tensor) -> Tensor:
    """Does not depend on the scale of the outputs, as after a normalization without stability offset."""
    return smooth(outputs / outputs.norm() * outputs.numel() ** 0.5)


def direction(layer: FactorizedMatrix, loss: Loss, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient ``G`` for the dense weight, as a matrix, from torch's own layer, and ``G V V^T + U U^T G``."""
    dense, (U, V) = layer.to_dense(), layer.factors()
    (gradient,) = torch.autograd.grad(loss(dense(x)), dense.weight)
    G = layer.matrix_of(gradient)
    return G, (G @ V @ V.mT + U @ U.mT @ G).detach()


def after_a_step(layer: FactorizedMatrix, loss: Loss, x: Tensor, rate: float) -> Tensor:
    """The product after a step of SGD on the factors, which stay where they are."""
    gradients = torch.autograd.grad(loss(layer(x)), layer.factors())
    U, V = (factor - rate * gradient for factor, gradient in zip(layer.factors(), gradients, strict=True))
    return (U @ V.mT).detach()


@each_layer
def test_the_update_of_a_product(make, shape):
    """``W - a (G V V^T + U U^T G) + a^2 G W^T G``, exactly."""
    layer, x = make(), torch.randn(shape, **DOUBLE)
    G, first = direction(layer, smooth, x)
    W, rate = layer.composed().detach(), 0.1
    assert_close(after_a_step(layer, smooth, x, rate), W - rate * first + rate**2 * G @ W.mT @ G)
    left = [(after_a_step(layer, smooth, x, a) - (W - a * first)).norm().item() for a in (0.1, 0.05)]
    assert left[0] / left[1] == pytest.approx(4, rel=1e-6)


@each_layer
def test_the_direction_of_a_normalized_layer_turns_by_the_effective_step_size(make, shape):
    """``w - a / ||W||_F^2 (I - w w^T) vec(D)``, ``D = G V V^T + U U^T G``, ``G`` the gradient for ``w``."""
    layer, x = make(), torch.randn(shape, **DOUBLE)
    W = layer.composed().detach()
    w, D = W / W.norm(), W.norm() * direction(layer, normalized, x)[1]
    turn = (D - (w * D).sum() * w) / W.norm() ** 2
    left = []
    for rate in (1e-3, 5e-4):
        after = after_a_step(layer, normalized, x, rate)
        left.append((after / after.norm() - (w - rate * turn)).norm().item())
    assert left[0] / left[1] == pytest.approx(4, rel=0.05)
