"""Projections of attention heads that are narrower than their attention takes them for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers.partitioned import full_shape

if TYPE_CHECKING:
    from typing_extensions import Self

Heads = Sequence[tuple[int, int]]  # for each projection that lies in a layer: how many heads, and their rank


def pad_heads(x: Tensor, heads: Heads, width: int) -> Tensor:
    """Fill every head in the last dimension up with zeros: ``(..., heads * rank)`` to ``(..., heads * width)``."""
    if all(rank == width for _, rank in heads):
        return x
    sides = x.split([count * rank for count, rank in heads], -1)
    padded = [F.pad(side.unflatten(-1, n_r), (0, width - n_r[1])) for side, n_r in zip(sides, heads, strict=True)]
    return torch.cat(padded, -2).flatten(-2) if len(padded) > 1 else padded[0].flatten(-2)


def trim_heads(x: Tensor, heads: Heads, width: int) -> Tensor:
    """Keep the first ``rank`` of each head's ``width`` in the last dimension; the inverse of :func:`pad_heads`."""
    ((count, rank),) = heads
    return x if rank == width else x.unflatten(-1, (count, width))[..., :rank].flatten(-2)


class HeadProjection(nn.Module):
    """Mixin before a linear layer: projects to or from attention heads that are narrower than the attention's own.

    The weight is that of the narrow heads. What the attention is given is filled up with zeros, and of what it gives
    the first ``rank`` entries of each head are read, so that it computes what it would with the narrow heads. Sizes
    such as ``out_features`` are those that the attention sees.

    Attributes:
        heads: For each projection that lies in the layer, one after the other, the number of heads and their rank.
        width: Width that a head has in the attention.
        dense_width: Width of a head in the dense layer.
        is_output: Whether the layer projects from heads, and not to them.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    heads: tuple[tuple[int, int], ...]
    width: int
    dense_width: int
    is_output: bool

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., heads * width)``; as output, ``(..., heads * width)`` to ``(..., out)``."""
        if self.is_output:
            return super().forward(trim_heads(x, self.heads, self.width))
        return pad_heads(super().forward(x), self.heads, self.width)

    @classmethod
    def empty_like(
        cls, dense: nn.Module, heads: Heads, *, width: int, is_output: bool, dense_width: int | None = None
    ) -> Self:
        """Make a layer in the place of ``dense`` whose parameters are not set yet; device, dtype and mode carry over.

        Raises:
            ValueError: If ``heads`` are none of ``dense``, or wider than ``width``.
        """
        dense_width = width if dense_width is None else dense_width
        heads = tuple((count, rank) for count, rank in heads)
        count, weight = sum(count for count, _ in heads), dense.get_parameter("weight")
        dim = int(is_output) ^ isinstance(dense, Conv1D)  # along which heads lie
        held = sum(n * r for n, r in dense.heads) if isinstance(dense, HeadProjection) else count * dense_width
        if weight.shape[dim] != held or not all(1 <= rank <= width <= dense_width for _, rank in heads):
            raise ValueError(f"{dense} has no heads {[*heads]} of width {width} in its {weight.shape[dim]}")
        shape = list(weight.shape)
        shape[dim] = sum(count * rank for count, rank in heads)
        ours = HeadConv1D if isinstance(dense, Conv1D) else HeadLinear
        layer: Any = ours.__new__(ours)
        nn.Module.__init__(layer)
        layer.heads, layer.width, layer.dense_width, layer.is_output = heads, width, dense_width, is_output
        layer.weight = nn.Parameter(weight.detach().new_empty(shape), requires_grad=weight.requires_grad)
        layer.register_parameter("bias", None)
        if (bias := dense._parameters.get("bias")) is not None:
            size = len(bias) if is_output else shape[dim]
            layer.bias = nn.Parameter(bias.detach().new_empty(size), requires_grad=bias.requires_grad)
        if isinstance(dense, Conv1D):
            layer.nx, layer.nf = shape
        else:
            layer.out_features, layer.in_features = shape
            layer.set_width_(width)
        return layer.train(dense.training)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight, which ``Conv1D`` holds transposed."""
        shape, dim = list(full_shape(self.weight)), int(self.is_output) ^ isinstance(self, Conv1D)
        shape[dim] = sum(count for count, _ in self.heads) * self.dense_width
        return tuple(shape)

    def set_width_(self, width: int) -> None:
        """Set the width that the attention gives to a head; no value changes."""
        self.width = width
        if not isinstance(self, Conv1D):
            setattr(self, "in_features" if self.is_output else "out_features", sum(n for n, _ in self.heads) * width)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return the plain layer whose heads are filled up with zeros; this layer is left as it is."""
        conv = isinstance(self, Conv1D)
        transposed = self.is_output if conv else not self.is_output  # heads do not lie in the last dimension
        weight = self.weight.detach()
        weight = pad_heads(weight.mT if transposed else weight, self.heads, self.dense_width)
        weight = (weight.mT if transposed else weight).clone(memory_format=torch.contiguous_format)
        rows, columns = weight.shape
        with torch.device("meta"):
            dense: Any = Conv1D(columns, rows) if conv else nn.Linear(columns, rows, bias=self.bias is not None)
        dense.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach() if self.is_output else pad_heads(self.bias.detach(), self.heads, self.dense_width)
            dense.bias = nn.Parameter(bias.clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, heads and ranks."""
        heads = ", ".join(f"{count} x {rank}" for count, rank in self.heads)
        return f"weight={tuple(self.weight.shape)}, heads={heads}, width={self.width}, bias={self.bias is not None}"


class HeadLinear(HeadProjection, nn.Linear):  # type: ignore[misc]
    """Linear layer to or from narrow heads."""


class HeadConv1D(HeadProjection, Conv1D):
    """GPT-2's layer to or from narrow heads."""


_WIDTHS = ("head_dim", "attention_head_size")  # attributes by which attentions shape their heads
_WIDTHS_OF_ALL = ("split_size", "all_head_size")


def narrow_(attention: nn.Module) -> None:
    """Let an attention shape its heads as wide as the highest of their ranks, if all of its projections are narrow.

    Only for an attention in which nothing but these attributes depends on the width; its softmax scale stays.
    """
    layers = [layer for layer in attention.modules() if isinstance(layer, HeadProjection)]
    heads = [head for layer in layers for head in layer.heads]
    if len(heads) < 4:  # query, key, value and output
        return
    count, width = heads[0][0], max(rank for _, rank in heads)
    for layer in layers:
        layer.set_width_(width)
    for module in attention.modules():
        for names, value in ((_WIDTHS, width), (_WIDTHS_OF_ALL, count * width)):
            for name in names:
                if name in vars(module):
                    setattr(module, name, value)
