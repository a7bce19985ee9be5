r"""What a step of SGD on factors does to their product (Kamalakara et al. 2022, Eq. 1; Khodak et al. 2021, Claim 3.1).

Both papers state it up to terms of second order in the rate, so halving the rate has to quarter what is left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from hf_fnl.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear
from hf_fnl.layers.base import FactorizedMatrix
from hf_fnl.layers.conv import kernel_matrix

DOUBLE = {"dtype": torch.float64}


def of_linear(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x, weight)


def of_embedding(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    return F.embedding(x, weight)


def of_convolution(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding, groups=layer.groups)


CONV = {"bias": False, "padding": 1, **DOUBLE}
LAYERS: dict[str, tuple[Callable[[], FactorizedMatrix], Callable[..., Tensor], Callable[[], Tensor]]] = {
    "linear": (lambda: FactorizedLinear(7, 5, 3, False, **DOUBLE), of_linear, lambda: torch.randn(11, 7, **DOUBLE)),
    "embedding": (
        lambda: FactorizedEmbedding(13, 7, 3, **DOUBLE),
        of_embedding,
        lambda: torch.randint(13, (4, 5)),
    ),
    "spatial": (
        lambda: FactorizedConv2d(4, 6, 3, 5, **CONV),
        of_convolution,
        lambda: torch.randn(3, 4, 5, 7, **DOUBLE),
    ),
    "channel": (
        lambda: FactorizedConv2d(4, 6, 3, 5, scheme="channel", **CONV),
        of_convolution,
        lambda: torch.randn(3, 4, 5, 7, **DOUBLE),
    ),
    "groups": (
        lambda: FactorizedConv2d(4, 6, 3, 5, groups=2, **CONV),
        of_convolution,
        lambda: torch.randn(3, 4, 5, 7, **DOUBLE),
    ),
}
each_layer = pytest.mark.parametrize(("make", "dense", "inputs"), LAYERS.values(), ids=LAYERS)


def smooth_loss(outputs: Tensor) -> Tensor:
    return outputs.sin().sum()


def normalized_loss(outputs: Tensor) -> Tensor:
    """Does not depend on the scale of the outputs, as after a normalization without stability offset."""
    return smooth_loss(outputs / outputs.norm() * outputs.numel() ** 0.5)


def as_matrix(layer: Any, weight: Tensor) -> Tensor:
    return kernel_matrix(weight, layer.scheme) if isinstance(layer, FactorizedConv2d) else weight


def gradient_of_product(
    layer: Any, loss: Callable[[Tensor], Tensor], dense: Callable[..., Tensor], x: Tensor
) -> Tensor:
    """The gradient for the dense weight, as a matrix, from torch's own layer."""
    weight = layer.dense_weight().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(dense(layer, weight, x)), weight)
    return as_matrix(layer, gradient)


def after_a_step(layer: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, rate: float) -> Tensor:
    """The product after a step of SGD on the factors, from where they are now; they stay there."""
    start = [factor.detach().clone() for factor in layer.factors()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    optimizer.zero_grad()
    loss(layer(x)).backward()
    optimizer.step()
    product = layer.composed().detach().clone()
    layer.set_factors_(tuple(start))
    return product


@each_layer
def test_the_update_of_a_product(make, dense, inputs):
    """``W - a (G V V^T + U U^T G) + a^2 G W^T G``, exactly."""
    layer, x, rate = make(), inputs(), 0.1
    G = gradient_of_product(layer, smooth_loss, dense, x)
    U, V = (factor.detach() for factor in layer.factors())
    W = U @ V.mT
    first = G @ V @ V.mT + U @ U.mT @ G
    assert_close(after_a_step(layer, smooth_loss, x, rate), W - rate * first + rate**2 * G @ W.mT @ G)
    left = [(after_a_step(layer, smooth_loss, x, a) - (W - a * first)).norm().item() for a in (0.1, 0.05)]
    assert left[0] / left[1] == pytest.approx(4, rel=1e-6)


@each_layer
def test_the_direction_of_a_normalized_layer_turns_by_the_effective_step_size(make, dense, inputs):
    """``w - a / ||W||_F^2 (I - w w^T) vec(D)``, ``D = G V V^T + U U^T G``, ``G`` the gradient for ``W / ||W||_F``."""
    layer, x = make(), inputs()
    U, V = (factor.detach() for factor in layer.factors())
    W = U @ V.mT
    norm = W.norm()
    G = norm * gradient_of_product(layer, normalized_loss, dense, x)
    D, direction = G @ V @ V.mT + U @ U.mT @ G, W / norm
    turn = (D - (direction * D).sum() * direction) / norm**2
    left = []
    for rate in (1e-3, 5e-4, 2.5e-4):
        after = after_a_step(layer, normalized_loss, x, rate)
        left.append((after / after.norm() - (direction - rate * turn)).norm().item())
    for larger, smaller in itertools.pairwise(left):
        assert larger / smaller == pytest.approx(4, rel=0.05)
