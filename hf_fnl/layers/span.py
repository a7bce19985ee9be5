"""A part of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers.linear import dense_weight


@dataclass(frozen=True)
class Span:
    """Outputs of a linear layer that follow one another: all of them, or the queries of a layer that gives keys too.

    Args:
        layer: The layer.
        start: First output.
        length: Number of outputs; ``None`` for all from ``start`` on.
    """

    layer: nn.Linear | Conv1D
    start: int = 0
    length: int | None = None

    def of(self, outputs: Tensor, dim: int = -1) -> Tensor:
        """These outputs among all, which lie along ``dim``; a view."""
        length = outputs.shape[dim] - self.start if self.length is None else self.length
        return outputs.narrow(dim, self.start, length)

    @property
    def weight(self) -> Tensor:
        """Their rows ``(length, in_features)`` of the weight, which ``Conv1D`` holds transposed; a view."""
        return self.of(dense_weight(self.layer), 0)

    @property
    def bias(self) -> Tensor | None:
        """Their part of the bias; a view."""
        return None if self.layer.bias is None else self.of(self.layer.bias)

    @torch.no_grad()
    def set_(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write their rows of the weight, and their part of the bias if there is one."""
        self.weight.copy_(weight)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
