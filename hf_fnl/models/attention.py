"""Attentions whose per-head products have ranks of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers.span import Span
from hf_fnl.math.spectral import DRAWN_METHODS, spectral_init_heads
from hf_fnl.surgery.config import LayerRanks

Spans = tuple[Span, Span, Span, Span]


class HeadProjection(nn.Linear):
    """A projection to or from attention heads, whose weight is drawn by the attention that holds its partner."""


class HeadConv1D(Conv1D):
    """The same for GPT-2's layout."""


class FactorizedAttention(nn.Module):
    """Mixin of an attention whose per-head products have ranks of their own.

    Query, key and value weights are ``(heads * rank, hidden)``, the output weight is ``(hidden, heads * rank)``. The
    softmax scale stays that of a dense head, ``(hidden / heads) ** -0.5``: a product of lower rank approximates the
    dense one and keeps its scale.
    """

    num_heads: int
    ranks: LayerRanks

    @staticmethod
    def projections(attention: Any) -> Spans:
        """Query, key, value and output of an attention of the family, ours or a stock one."""
        raise NotImplementedError

    def output_std(self, std: float) -> float:
        """Scale at which the output matrix is drawn, where the others are drawn at ``std``."""
        return std

    def draw_heads(self, hidden: int, std: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four dense weights ``(hidden, hidden)``, drawn in the order in which the stock model draws them."""
        weight = self.projections(self)[0].weight
        query, key, value, output = (draw_normal_(weight.new_empty(hidden, hidden), std) for _ in range(4))
        return query, key, value, output

    @torch.no_grad()
    def init_heads_(self, std: float) -> None:
        """Draw the four dense weights as the stock model would, and cut every head to its ranks.

        Writes only what a checkpoint has not set; draws nothing if it has set everything.
        """
        spans = self.projections(self)
        fresh = [span for span in spans if not is_loaded(span.layer.weight)]
        if not fresh:
            return
        query, key, value, output = self.draw_heads(spans[0].weight.shape[1], std)
        Q_h, K_h, V_h = (weight.unflatten(0, (self.num_heads, -1)).mT for weight in (query, key, value))
        O_h = output.unflatten(1, (self.num_heads, -1)).transpose(0, 1)
        stds, init = (std, self.output_std(std)), self.ranks.init
        inward = he_std(query.shape[1])
        Q_h, K_h = _cut_heads(Q_h, K_h, self.ranks.qk, init["qk"], (std, std), (inward, inward))
        outward = he_std(self.num_heads * (self.ranks.ov or 1))  # the output matrix adds the heads up
        V_h, O_h = _cut_heads(V_h, O_h, self.ranks.ov, init["ov"], stds, (inward, outward))
        drawn = [*(factor.mT.flatten(0, 1) for factor in (Q_h, K_h, V_h)), O_h.transpose(0, 1).flatten(1)]
        for span, weight in zip(spans, drawn, strict=True):
            if span in fresh:
                span.weight.copy_(weight)


def _cut_heads(
    left: Tensor,
    right: Tensor,
    rank: int | None,
    method: str,
    stds: tuple[float, float],
    he_stds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    if rank is None:
        return left, right
    if method in DRAWN_METHODS:
        sides = zip((left, right), he_stds if method == "he" else stds, strict=True)
        left, right = (draw_normal_(factor.new_empty(*factor.shape[:2], rank), std) for factor, std in sides)
        return left, right
    return spectral_init_heads(left, right, rank, method)


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """``(batch, length, heads * rank)`` to ``(batch, heads, length, rank)``."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def cached_heads(
    compute: Callable[[], tuple[Tensor, Tensor]],
    cache: Cache | None,
    layer_idx: int,
    *,
    crossing: bool = False,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Keys and values, those of earlier calls included.

    Args:
        compute: Gives the keys and values of this call, each ``(batch, heads, length, rank)``; not asked for those of
            an encoder that the cache holds already.
        cache: The cache, if any.
        layer_idx: Number of the layer in the cache.
        crossing: Whether they are those of an encoder.
        options: What the kernel is going to be given; a paged cache reads and changes it.

    Raises:
        TypeError: If keys and values of an encoder are to go into a cache that has no place of its own for them.
        ValueError: If the cache holds keys or values of other widths, such as those of a prefix.
    """
    if cache is None:
        return compute()
    if not crossing:
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        heads = compute()
        _check_widths(own, layer_idx, heads)
        return own.update(*heads, layer_idx, kwargs=options)
    if not isinstance(cache, EncoderDecoderCache):
        raise TypeError(f"a model with cross-attention needs an EncoderDecoderCache, got a {type(cache).__name__}")
    if cache.is_updated.get(layer_idx):
        layer = cache.cross_attention_cache.layers[layer_idx]
        return layer.keys, layer.values
    key, value = cache.cross_attention_cache.update(*compute(), layer_idx)
    cache.is_updated[layer_idx] = True
    return key, value


def _check_widths(cache: Any, layer_idx: int, heads: tuple[Tensor, Tensor]) -> None:
    layers = getattr(cache, "layers", ())
    if layer_idx >= len(layers) or not getattr(layers[layer_idx], "is_initialized", False):
        return
    for name, held, new in zip(
        ("keys", "values"), (layers[layer_idx].keys, layers[layer_idx].values), heads, strict=True
    ):
        if held.ndim == new.ndim and held.shape[-1] != new.shape[-1]:
            raise ValueError(
                f"the cache holds {name} {held.shape[-1]} wide in layer {layer_idx}, whose heads have {new.shape[-1]}: "
                "prefix tuning (where token_dim is that times the heads), and prefill_chunk_size with a static cache, "
                "need qk_rank and ov_rank to be one number"
            )


def attend(
    attention: Any,
    eager: Callable[..., Any],
    heads: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    *,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the kernel that the configuration of the model names.

    Args:
        attention: The module, with its ``config`` and ``scaling``.
        eager: The stock family's own implementation.
        heads: Queries, keys and values ``(batch, heads, length, rank)``.
        mask: As the stock layer takes it.
        dropout: Rate in training.
        kwargs: Others that the kernel takes.

    Returns:
        The heads' contexts side by side, ``(batch, length, heads * ov_rank)``, and the weights if the kernel has them.
    """
    kernel: Any = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    rate = dropout if attention.training else 0.0
    context, weights = kernel(attention, *heads, mask, dropout=rate, scaling=attention.scaling, **kwargs)
    return context.flatten(-2), weights


def he_std(fan_in: int) -> float:
    """Standard deviation of a weight by the rule of He et al. 2015."""
    return math.sqrt(2 / fan_in)


def draw_normal_(weight: Tensor, std: float) -> Tensor:
    """Fill a weight as Transformers' own ``_init_weights`` does."""
    return weight.normal_(0.0, std)


def is_loaded(parameter: Tensor) -> bool:
    """Whether ``from_pretrained`` has set this parameter, by the mark that Transformers leaves on it."""
    return getattr(parameter, "_is_hf_initialized", False)


def dense_heads(attention: FactorizedAttention, head_dim: int) -> dict[nn.Module, tuple[Tensor, Tensor | None]]:
    """Weights and biases of the layers of an attention with heads of ``head_dim``, widened with zeros.

    Returns:
        For each layer its weight, in the layer's own layout, and its bias.
    """
    *inner, outer = attention.projections(attention)
    heads = attention.num_heads
    parts: dict[nn.Module, list[Span]] = {}
    for span in inner:
        parts.setdefault(span.layer, []).append(span)
    widened: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    for layer, spans in parts.items():
        weight = torch.cat([pad_heads(span.weight, heads, head_dim) for span in spans])
        biases = [pad_heads(span.bias, heads, head_dim) for span in spans if span.bias is not None]
        widened[layer] = _in_layout(layer, weight), torch.cat(biases) if biases else None
    widened[outer.layer] = _in_layout(outer.layer, pad_heads(outer.weight, heads, head_dim, dim=1)), outer.bias
    return widened


def _in_layout(layer: nn.Module, weight: Tensor) -> Tensor:
    return weight.mT if isinstance(layer, Conv1D) else weight


def pad_heads(weight: Tensor, num_heads: int, head_dim: int, dim: int = 0) -> Tensor:
    """Widen ``num_heads`` heads that lie side by side along ``dim`` to ``head_dim`` each, with zeros."""
    heads = weight.unflatten(dim, (num_heads, -1))
    missing = head_dim - heads.shape[dim + 1]
    padding = [0, 0] * (heads.ndim - dim - 2) + [0, missing]
    return nn.functional.pad(heads, padding).flatten(dim, dim + 1)
