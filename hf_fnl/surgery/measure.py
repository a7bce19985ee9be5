"""What calibration measures where a module is called: moments of its inputs, or of what flows through its heads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from hf_fnl.layers.linear import Span
from hf_fnl.math.truncation import HeadMoments, Moments


@dataclass(frozen=True)
class HeadMomentsRequest:
    """Asks for the moments of what flows through the heads of an attention.

    Args:
        num_heads: Heads of queries and contexts.
        num_kv_heads: Heads of keys and values; what several queries or contexts share one of is taken together.
        query: Outputs of a layer inside the attention that are the queries of all heads, side by side.
        key: Likewise.
        output: Layer inside the attention that is given the contexts of all heads, side by side.
    """

    num_heads: int
    num_kv_heads: int
    query: Span | None = None
    key: Span | None = None
    output: nn.Module | None = None


# What is measured where a module is called: moments of its inputs, those of its heads, or nothing.
Request: TypeAlias = Literal["inputs"] | HeadMomentsRequest | None
Measured: TypeAlias = Moments | HeadMoments | None


def head_moments(heads: HeadMomentsRequest, call: Callable[[], Any]) -> HeadMoments | None:
    """Moments of what flows through the heads of an attention, which runs for it."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        num_heads = heads.num_kv_heads if name == "key" else heads.num_heads
        seen.setdefault(name, []).append(_by_kv_head(x, heads, num_heads))

    def note_span(name: str, span: Span, module: nn.Module, args: Any, result: Tensor) -> None:
        note(name, span.of(result))

    hooks = []
    for name, span in (("query", heads.query), ("key", heads.key)):
        if span is not None:
            hooks.append(span.layer.register_forward_hook(functools.partial(note_span, name, span)))
    if heads.output is not None:
        hooks.append(heads.output.register_forward_pre_hook(lambda module, args: note("context", args[0])))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: torch.cat(parts, 1) for name, parts in seen.items()}
    if not found or not all(x.shape[1] for x in found.values()):
        return None
    query, key, context = (Moments.of(found[x]) if x in found else None for x in ("query", "key", "context"))
    return HeadMoments(query, key, context)


def samples(x: Tensor) -> Tensor:
    """Vectors ``(..., n)`` as ``(count, n)``."""
    return x.reshape(-1, x.shape[-1])


def query_grams(request: HeadMomentsRequest, gradient: Tensor) -> Tensor:
    """Sums of ``g^T g`` of the gradients at queries, of all that share a key, ``(num_kv_heads, r, r)``."""
    assert request.query is not None
    by_head = _by_kv_head(request.query.of(gradient), request, request.num_heads)
    return by_head.mT @ by_head


def _by_kv_head(x: Tensor, request: HeadMomentsRequest, num_heads: int) -> Tensor:
    """Vectors of ``num_heads`` heads side by side as ``(num_kv_heads, count, r)``, those that share a head in one."""
    vectors = samples(x).unflatten(-1, (request.num_kv_heads, num_heads // request.num_kv_heads, -1))
    return vectors.transpose(0, 1).flatten(1, 2)
