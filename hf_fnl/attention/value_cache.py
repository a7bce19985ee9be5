"""Caches that hold values as narrow as heads are cut, in the place of the zeros that fill them up."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache

from hf_fnl.attention.adapters import projections_of
from hf_fnl.layers import HeadProjection
from hf_fnl.layers.weight import HoldsFactors


class NarrowValues(Cache):
    """A cache as an attention with narrow values sees it: the cache holds ``rank`` of the ``width`` that go in and out.

    What was in the cache before stays as wide as it is, and so does what comes to it.

    Args:
        cache: A cache of any class.
        rank: Entries of a head's value that are not zero, the first.
        width: Entries that the attention shapes.
    """

    def __init__(self, cache: Cache, rank: int, width: int) -> None:
        self.cache, self.rank, self.width = cache, rank, width

    @property
    def layers(self) -> Any:
        """The layers of the cache."""
        return self.cache.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens; returns those of all, both ``(batch, heads, tokens, width)``."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        present, group = getattr(layer, "values", None), getattr(layer, "q_group_size", 1)
        kept = min(-(-self.rank // group) * group, self.width)  # a quantized cache takes groups with one scale each
        if present is not None and present.ndim == 4:
            kept = present.shape[-1]
        keys, values = self.cache.update(key_states, value_states[..., :kept], layer_idx, *args, **kwargs)
        return keys, F.pad(values, (0, self.width - values.shape[-1]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


@dataclass(frozen=True)
class NarrowValueCache:
    """Hook before the forward pass of an attention that hands it :class:`NarrowValues` in the place of its cache.

    In an encoder-decoder that is the decoder's own cache. Where an adapter is around the layer that gives the values,
    or something else took its place, it changes nothing.

    Args:
        layer: Name of the layer that gives the values.
    """

    layer: str

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Return the arguments of the forward pass."""
        layer = getattr(module, self.layer)
        rank = narrow_rank(layer)
        if rank is None or not any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            return None

        def narrow(value: Any) -> Any:
            if isinstance(value, EncoderDecoderCache):
                value = copy.copy(value)
                value.self_attention_cache = NarrowValues(value.self_attention_cache, rank, layer.width)
                return value
            return NarrowValues(value, rank, layer.width) if isinstance(value, Cache) else value

        return tuple(map(narrow, args)), {name: narrow(value) for name, value in kwargs.items()}


def narrow_rank(layer: Any) -> int | None:
    """Return the width of the values that a layer gives; ``None`` if that is the width that the attention shapes."""
    if not isinstance(layer, HeadProjection) or layer.is_output:
        return None
    rank = layer.heads[-1][1]  # values lie last where queries or keys lie beside them
    return rank if rank < layer.width else None


def narrow_value_caches_(model: nn.Module) -> None:
    """Let the attentions of a model whose values are narrow cache them so, and all others as they come."""
    narrow: dict[nn.Module, str] = {}
    for module in model.modules():
        layers = (layer for child in module.children() for layer in (child, *child.children()))
        if all(narrow_rank(layer) is None for layer in layers):
            continue  # an attention has them in itself or in its children
        found = projections_of(module)
        # That to images of Mllama reads from the cache by itself what was put there.
        is_to_images = "cross_attention_states" in inspect.signature(module.forward).parameters
        if found is not None and not isinstance(found.value, HoldsFactors) and not is_to_images:
            for owner in module.modules():
                for name, layer in owner.named_children():
                    if isinstance(layer, HeadProjection) and layer.weight is found.value.weight:
                        narrow[owner] = name
    for module in model.modules():
        present = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, NarrowValueCache)]
        if module not in narrow:
            for key in present:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        elif not present:
            module.register_forward_pre_hook(NarrowValueCache(narrow[module]), with_kwargs=True)
