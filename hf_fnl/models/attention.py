"""Attentions whose per-head products have ranks of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from hf_fnl.config import LayerRanks
from hf_fnl.spectral import spectral_init_heads


class HeadProjection(nn.Linear):
    """A projection to or from attention heads, whose weight is drawn by the attention that holds its partner."""


class FactorizedAttention(nn.Module):
    """Mixin of an attention whose per-head products have ranks of their own.

    A family's attention names its :class:`HeadProjection` layers in ``projections``; query, key and value weights are
    ``(heads * rank, hidden)``, the output weight is ``(hidden, heads * rank)``. The softmax scale stays that of a dense
    head, ``(hidden / heads) ** -0.5``: a product of lower rank approximates the dense one and keeps its scale.
    """

    num_heads: int
    ranks: LayerRanks

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """Query, key, value and output."""
        raise NotImplementedError

    @torch.no_grad()
    def init_heads_(self, std: float) -> None:
        """Draw the four dense weights as the stock model would, and cut every head to its ranks.

        Writes only what a checkpoint has not set; draws nothing if it has set everything.
        """
        weights = [projection.weight for projection in self.projections()]
        if all(is_loaded(weight) or weight.is_meta for weight in weights):
            return
        query, key, value, output = weights
        hidden = query.shape[1]
        ranks, method = self.ranks, self.ranks.init
        dense = [draw_normal_(query.new_empty(hidden, hidden), std) for _ in weights]
        Q_h, K_h, V_h = (weight.unflatten(0, (self.num_heads, -1)).mT for weight in dense[:3])
        O_h = dense[3].unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        Q_h, K_h = _cut_heads(Q_h, K_h, ranks.qk, method, std)
        V_h, O_h = _cut_heads(V_h, O_h, ranks.ov, method, std)
        for weight, factor in zip((query, key, value), (Q_h, K_h, V_h), strict=True):
            init.copy_(weight, factor.mT.flatten(0, 1))
        init.copy_(output, O_h.transpose(0, 1).flatten(1))


def _cut_heads(left: Tensor, right: Tensor, rank: int | None, method: str, std: float) -> tuple[Tensor, Tensor]:
    if rank is None:
        return left, right
    if method == "default":
        left, right = (draw_normal_(factor.new_empty(*factor.shape[:2], rank), std) for factor in (left, right))
        return left, right
    return spectral_init_heads(left, right, rank, method)


def draw_normal_(weight: Tensor, std: float) -> Tensor:
    """Fill a weight as Transformers' own ``_init_weights`` does."""
    return weight.normal_(0.0, std)


def is_loaded(parameter: Tensor) -> bool:
    """Whether ``from_pretrained`` has set this parameter, by the mark that Transformers leaves on it."""
    return getattr(parameter, "_is_hf_initialized", False)


def pad_heads(weight: Tensor, num_heads: int, head_dim: int, dim: int = 0) -> Tensor:
    """Widen ``num_heads`` heads that lie side by side along ``dim`` to ``head_dim`` each, with zeros."""
    heads = weight.unflatten(dim, (num_heads, -1))
    missing = head_dim - heads.shape[dim + 1]
    padding = [0, 0] * (heads.ndim - dim - 2) + [0, missing]
    return nn.functional.pad(heads, padding).flatten(dim, dim + 1)
