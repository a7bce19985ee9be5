"""Adapters: from the modules of a model to the projections of its attentions, one adapter for each layout."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention.invariance import Adapter, invariant_kinds
from hf_fnl.attention.projections import AttentionProjections, Projection, Section, size
from hf_fnl.layers import HeadProjection
from hf_fnl.layers.partitioned import full_shape
from hf_fnl.layers.weight import HoldsFactors

# Where query, key, value and output are layers of their own.
_SEPARATE = (
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa, ELECTRA and many others
    ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),  # DeBERTa-v2
    ("attention.query", "attention.key", "attention.value", "output.dense"),  # FLAVA, DPT, BLIP-2's Q-Former
    ("query", "key", "value", "dense"),  # ALBERT
    ("query", "key", "value", "out_proj"),  # Grounding DINO, ZoeDepth
    ("query", "key", "value", "output"),  # Pix2Struct
    ("query_proj", "key_proj", "value_proj", "out_proj"),  # ProphetNet
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma, ViT
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, Marian, CLIP, Whisper, GPT-J
    ("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    ("q_proj", "k_proj", "v_proj", "Wo"),  # ModernBERT's decoder
    ("q", "k", "v", "o"),  # T5, MPNet
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT, XLM
    ("linear_q", "linear_k", "linear_v", "linear_out"),  # Conformers
)

# Where one linear layer gives all queries, then all keys, then all values. Layouts that mix them head by head, as
# GPT-NeoX and BLOOM do, must not be added here.
_FUSED = (
    ("qkv_proj", "o_proj"),  # Phi-3
    ("Wqkv", "Wo"),  # ModernBERT
    ("Wqkv", "out_proj"),  # MPT, DBRX
    ("qkv", "proj"),  # SAM, Qwen2-VL
    ("qkv", "projection"),  # BLIP
    ("att_proj", "out_proj"),  # Bark
)

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")


def _separate(module: nn.Module) -> AttentionProjections | None:
    """Four layers, in the attention itself or in its children."""
    for paths in _SEPARATE:
        if _layer(module, paths[0]) is None:
            continue  # as in most modules that are asked
        layers = [_layer(module, path) for path in paths]
        if None not in layers:
            owner = _resolve(module, paths[0].rpartition(".")[0])
            # A child that has its own output is the attention; the output found here is then the feed-forward's.
            return None if owner is not module and _separate(owner) else _fitted(owner, layers)
    return None


def _fused(module: nn.Module) -> AttentionProjections | None:
    """One linear layer ``[Q; K; V]``, where K and V may have fewer heads than Q, and one for the output."""
    for inputs, output in ((_layer(module, a), _layer(module, b)) for a, b in _FUSED):
        if isinstance(inputs, HeadProjection) and output is not None:
            lengths = [count * rank for count, rank in inputs.heads]
            return _fitted(module, [*_split(inputs.weight, *lengths), output])
        if isinstance(inputs, nn.Linear) and output is not None:
            total, queries = size(inputs, 0), size(output, 1)
            if (total - queries) % 2 == 0 and queries < total:
                return _fitted(module, [*_split(inputs.weight, queries, *[(total - queries) // 2] * 2), output])
    return None


def _gpt2(module: nn.Module) -> AttentionProjections | None:
    """GPT-2's ``c_attn`` of ``[Q | K | V]``; in cross-attention ``q_attn`` and a ``c_attn`` of ``[K | V]``."""
    fused, query, output = (_layer(module, name) for name in ("c_attn", "q_attn", "c_proj"))
    if not isinstance(fused, Conv1D) or output is None:
        return None
    values, total = size(output, 1), size(fused, 0)
    if query is None:
        queries = (total - values) // 2
        return _fitted(module, [*_split(fused.weight, queries, queries, values, dim=1), output])
    return _fitted(module, [query, *_split(fused.weight, total - values, values, dim=1), output])


def _torch(module: nn.Module) -> AttentionProjections | None:
    """:class:`torch.nn.MultiheadAttention`, whose weights are parameters of its own."""
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        inputs = [section for weight in weights for section in _split(weight, full_shape(weight)[0])]
    else:
        inputs = _split(module.in_proj_weight, *[module.embed_dim] * 3)
    return _fitted(module, [*inputs, module.out_proj])


_BUILT_IN: tuple[Adapter, ...] = (_separate, _fused, _gpt2, _torch)
_REGISTERED: OrderedDict[int, Adapter] = OrderedDict()


def register_attention(adapter: Adapter) -> RemovableHandle:
    r"""Teach :func:`~hf_fnl.attention.find_products` another attention.

    Adapters are asked in turn, the newest first and the built-in ones last::

        def mine(module):
            if isinstance(module, MyAttention):
                return AttentionProjections(module.wq, module.wk, module.wv, module.wo, module.heads)

    What an adapter says is taken for true. It must hold that, head by head, ``V R`` and ``O R^-T`` give the same
    outputs as ``V`` and ``O`` for every invertible ``R (r, r)``, and so for queries and keys: nothing but the weighted
    sum over tokens stands between the two, no gate, norm or exchange of heads. Under rotary positions queries and keys
    are no product in this sense; who registers such an attention means that of tokens at the same position.
    Biases are no part of a product: the value's moves along with its heads, as ``b R``.

    Args:
        adapter: Takes any module; returns its projections, or ``None`` if it is no such attention.

    Returns:
        A handle whose ``remove()`` forgets the adapter; it ends a ``with`` block in the same way.
    """
    handle = RemovableHandle(_REGISTERED)
    _REGISTERED[handle.id] = adapter
    return handle


@dataclass(frozen=True)
class KnownAttention:
    """An attention that an adapter knows.

    Args:
        projections: Its projections.
        kinds: The products by which it computes, of ``"qk"`` and ``"ov"``, each with whether it calls the layers that
            hold it, and does not only read their weights; ``None`` if there is no telling.
    """

    projections: AttentionProjections
    kinds: Mapping[str, bool] | None


def attention_of(module: nn.Module) -> KnownAttention | None:
    """Return what is known of a module as an attention, ``None`` if no adapter knows it."""
    for registered in reversed(_REGISTERED.values()):
        if (projections := registered(module)) is not None:
            return KnownAttention(projections, {"qk": True, "ov": True})
    for adapter in _BUILT_IN:
        if (projections := adapter(module)) is not None:
            return KnownAttention(projections, invariant_kinds(module, adapter))
    return None


def projections_of(module: nn.Module) -> AttentionProjections | None:
    """Return the projections of an attention of a known layout, whatever it computes; ``None`` of other modules."""
    if next(module.children(), None) is None:
        return None
    return next((found for adapter in _BUILT_IN if (found := adapter(module)) is not None), None)


def _fitted(owner: Any, projections: Sequence[Projection]) -> AttentionProjections | None:
    """Projections with the number of heads that ``owner`` has; ``None`` where they only look like an attention's."""
    query, key, value, output = projections
    try:
        return AttentionProjections(query, key, value, output, _count_heads(owner, query))
    except ValueError:
        return None


def _split(weight: Tensor, *lengths: int, dim: int = 0) -> list[Section]:
    starts = itertools.accumulate(lengths, initial=0)
    return [Section(weight, start, length, dim) for start, length in zip(starts, lengths, strict=False)]


def _layer(module: nn.Module, path: str) -> nn.Linear | Conv1D | HoldsFactors | None:
    """The layer at ``path`` if it holds a matrix, or a product, that is a parameter of the model."""
    layer = _resolve(module, path)
    plain = isinstance(layer, nn.Linear | Conv1D) and isinstance(layer.weight, nn.Parameter)
    return layer if plain or isinstance(layer, HoldsFactors) else None


def _resolve(module: Any, path: str) -> Any:
    return functools.reduce(lambda inner, name: getattr(inner, name, None), filter(None, path.split(".")), module)


def _count_heads(owner: Any, query: Projection) -> int:
    """From a number that the module holds, from the width of its heads, or from its config; 0 if there is none."""
    if isinstance(query, HeadProjection):
        return query.heads[0][0]
    if (count := _first_int(owner, _HEAD_COUNTS)) is not None:
        return count
    if (width := _first_int(owner, _HEAD_WIDTHS)) is not None:
        return size(query, 0) // width
    return _first_int(getattr(owner, "config", None), _HEAD_COUNTS) or 0


def _first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int) and value > 0), None)
