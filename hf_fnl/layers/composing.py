"""Weights that are multiplied out for inference, where that takes less than the factors."""

from __future__ import annotations

import math
from types import TracebackType

import torch
from torch import nn

from hf_fnl.layers.base import Factorized
from hf_fnl.layers.embedding import FactorizedEmbedding


class ComposedWeights:
    """Dense weights that layers hold besides their factors; see :func:`compose_`.

    Attributes:
        layers: The layers that hold one.
    """

    def __init__(self, layers: list[Factorized]) -> None:
        self.layers = layers

    def remove(self) -> None:
        """Let the layers compute with their factors again."""
        for layer in self.layers:
            layer.hold_weight_(None)

    def __enter__(self) -> ComposedWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@torch.no_grad()
def compose_(model: nn.Module) -> ComposedWeights:
    """Let layers whose factors hold more numbers than their matrix compute with the matrix, in inference.

    A linear layer of rank ``r`` takes ``(m + n) r`` multiplications a row with its factors and reads as many numbers,
    and with its matrix ``m n``: factors win exactly where ``r < m n / (m + n)``, for one row as for many. Layers above
    that (overcomplete or deep ones, most of all) multiply their weight out, once, and keep it beside the factors.
    Those below, and embeddings, stay as they are. Outputs change by rounding.

    The weight is used in evaluation mode, without gradients. It is no parameter and no buffer, so it is never saved;
    it takes the memory of a dense weight. A layer lets go of it when it is set to training, moved, cast or loaded. Do
    not change its factors in another way meanwhile. To be rid of the factors for good, use ``merge_``.

    Example::

        with compose_(model):
            model.generate(**inputs)

    Args:
        model: In evaluation mode.

    Returns:
        What ends it, by ``remove()`` or as a context manager.

    Raises:
        ValueError: If the model is in training mode, or holds no values.
    """
    if model.training:
        raise ValueError("compose_ is for inference: call model.eval() first")
    layers = [module for module in model.modules() if isinstance(module, Factorized) and _is_cheaper_composed(module)]
    if any(layer.factors()[0].is_meta for layer in layers):
        raise ValueError("compose_ needs values: the model is on the meta device, or offloaded by accelerate")
    for layer in layers:
        layer.hold_weight_(layer.dense_weight())
    return ComposedWeights(layers)


def _is_cheaper_composed(layer: Factorized) -> bool:
    if isinstance(layer, FactorizedEmbedding):
        return False
    return layer.factored_cost() >= math.prod(layer.dense_shape)
