r"""Measures whether an attention computes by its products: whether its projections multiply as these say.

A head's values ``V`` and outputs ``O`` count as ``V O^T`` alone if ``V R`` and ``O R^-T`` give the same outputs for
every invertible ``R``, and so do its queries and keys. Heads that are paired, mixed, gated or normalized on the way
break this, whatever the names of the layers. So the attention itself is run: a copy with random weights, for a few
tokens.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_fnl.attention.projections import AttentionProjections, inputs_of, size
from hf_fnl.layers.partitioned import full_shape

_TOLERANCE = 1e-3  # of what one factor alone changes; a factor of a thousand above what float32 rounds
_WIDTH = 64  # inputs and outputs of an attention that are looked at, which keeps that of a large model cheap
# What a copy does not take along: the state of nn.Module, hooks among it, and what accelerate puts before a forward.
_NOT_COPIED = frozenset(vars(nn.Module())) | {"forward", "_hf_hook", "_old_forward"}
_ROTATIONS = ("position_embeddings", "sinusoidal_pos")
_MEASURED: dict[Hashable, Mapping[str, bool] | None] = {}

Adapter = Callable[[nn.Module], AttentionProjections | None]


def invariant_kinds(attention: nn.Module, adapter: Adapter) -> Mapping[str, bool] | None:
    """The kinds of products by which an attention computes, as in :class:`~hf_fnl.attention.adapters.KnownAttention`.

    Measured once for all attentions of a class, sizes, settings and configuration. Tokens are at positions of their
    own, so that queries and keys which rotary embeddings turn by different angles are no product.

    Args:
        attention: Stays as it is. None of its weights is read: they may be anywhere, or divided among processes.
        adapter: Finds its projections, and those of a copy.
    """
    key = type(attention), *_settings(attention)
    if key not in _MEASURED:
        _MEASURED[key] = _measure(attention, adapter)
    return _MEASURED[key]


def _settings(attention: nn.Module) -> Iterator[Hashable]:
    """Everything that the computation of a class can depend on, except the number of the layer."""
    yield str(getattr(attention, "config", None))
    yield tuple((name, tuple(full_shape(parameter))) for name, parameter in attention.named_parameters())
    for module in attention.modules():
        yield (type(module),)
        for name, value in vars(module).items():
            is_setting = isinstance(value, bool | int | str) or (callable(value) and isinstance(value, Hashable))
            if is_setting and name != "training" and not name.startswith("layer_i"):
                yield name, value


@torch.no_grad()
def _measure(attention: nn.Module, adapter: Adapter) -> Mapping[str, bool] | None:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        try:
            twin = _redrawn(attention, {}, generator).eval()
        except Exception:  # there is no telling what a copy of a foreign class raises
            return None
        if (projections := adapter(twin)) is None:
            return None
        called: set[nn.Module] = set()
        for module in twin.modules():
            module.register_forward_pre_hook(lambda module, args: called.add(module))
        seen = [found for calls in _calls(twin, projections, generator) if (found := _run(twin, projections, calls))]
    if not seen:
        return None
    # However it may be called: with rotary positions, too, where these can be left out.
    kinds = {kind for changes in seen for kind, (alone, _) in changes.items() if alone > _TOLERANCE}
    false = {kind for changes in seen for kind, (alone, both) in changes.items() if both > _TOLERANCE * alone}
    products = projections.products("", _names(twin), None)
    holders = {p.kind: {twin.get_submodule(f.name.rpartition(".")[0]) for f in p.places} for p in products}
    return {kind: holders[kind] <= called for kind in kinds - false}


def _names(module: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _run(
    twin: nn.Module, projections: AttentionProjections, calls: Iterator[dict[str, Any]]
) -> dict[str, tuple[float, float]]:
    """The changes of those products that affect the outputs, from the first call in which all or else the most do."""
    generator = torch.Generator().manual_seed(1)
    most: dict[str, tuple[float, float]] = {}
    for arguments in calls:
        try:
            changes = _changes(twin, projections, arguments, generator)
        except Exception:  # there is no telling what a call with the wrong arguments does
            continue
        # Of a product that does not matter, as queries and keys of a single token do not, a call says nothing.
        mattering = {kind: change for kind, change in changes.items() if change[0] > _TOLERANCE}
        most = max(most, mattering, key=len)
        if len(mattering) == len(changes):
            break
    return most


def _changes(
    twin: nn.Module, projections: AttentionProjections, arguments: Mapping[str, Any], generator: torch.Generator
) -> dict[str, tuple[float, float]]:
    """Return how far the outputs move, relative to them, if one factor of a product changes alone, and if both do."""
    products = list(projections.products("", _names(twin), None))
    for factor in (factor for product in products for factor in product.factors(twin)):
        factor[..., _WIDTH:, :] = 0
    expected = _outputs(twin, arguments)
    changes = {}
    for product in products:
        left, right = (factor[..., :_WIDTH, :] for factor in product.factors(twin))
        before = left.clone(), right.clone()
        heads = [min(sizes) for sizes in zip(left.shape[:-2], right.shape[:-2], strict=True)]
        basis = torch.linalg.qr(_normal(*heads, left.shape[-1], left.shape[-1], generator=generator)).Q
        scale = _scales(basis[..., :1, :].shape, generator)
        left.copy_(left @ (basis * scale))
        alone = _distance(_outputs(twin, arguments), expected)
        right.copy_(right @ (basis / scale))
        changes[product.kind] = alone, _distance(_outputs(twin, arguments), expected)
        left.copy_(before[0])
        right.copy_(before[1])
    return changes


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def _scales(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32) + 0.5


def _redrawn(module: nn.Module, copied: dict[Any, Any], generator: torch.Generator) -> nn.Module:
    """A copy without hooks, its parameters drawn in float32; biases, which move along with a product, are zero."""
    twin = copied[module] = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    vars(twin).update({name: value for name, value in vars(module).items() if name not in _NOT_COPIED})
    if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
        vars(twin)["config"] = copy.deepcopy(config)
        vars(twin)["config"]._attn_implementation = "eager"
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter not in copied:
            copied[parameter] = nn.Parameter(_draw(name, full_shape(parameter), generator))
        twin.register_parameter(name, None if parameter is None else copied[parameter])
    for name, buffer in module._buffers.items():
        if buffer is not None:
            buffer = torch.ones(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.cpu()
            buffer = buffer.float() if buffer.is_floating_point() else buffer
        twin.register_buffer(name, buffer)
    for name, child in module._modules.items():
        twin.add_module(name, None if child is None else copied.get(child) or _redrawn(child, copied, generator))
    return twin


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float32)
    if len(shape) < 2:  # of normalizations, ones in a fresh model
        return _scales(shape, generator)
    if len(shape) > 2 or min(shape) <= _WIDTH:
        return _normal(*shape, generator=generator) / shape[-1] ** 0.5
    weight = torch.zeros(shape, dtype=torch.float32)
    weight[:_WIDTH] = _normal(_WIDTH, shape[1], generator=generator) / shape[1] ** 0.5
    weight[:, :_WIDTH] = _normal(shape[0], _WIDTH, generator=generator) / _WIDTH**0.5
    return weight


def _calls(
    attention: nn.Module, projections: AttentionProjections, generator: torch.Generator
) -> Iterator[Iterator[dict[str, Any]]]:
    """Ways in which an attention may be called: some without rotary positions, and some with each width of them."""
    names = set(inspect.signature(attention.forward).parameters)
    width = size(projections.query, 0) // projections.num_heads
    for rotation in (1, width, 0) if names & set(_ROTATIONS) else (0,):
        yield _arguments(attention, projections, rotation, generator)


def _arguments(
    attention: nn.Module, projections: AttentionProjections, rotation: int, generator: torch.Generator
) -> Iterator[dict[str, Any]]:
    """Arguments of a call, by the names that Transformers gives to them."""
    parameters = inspect.signature(attention.forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        return
    names = {parameter.name for parameter in named}
    required = [parameter.name for parameter in named if parameter.default is parameter.empty]
    tokens = 256 if "height" in names else 4
    layouts: list[tuple[int, ...]] = [(2, tokens), (1, tokens), (tokens,), (1, 2, tokens // 2)]
    if "cu_seqlens" in names:
        layouts.insert(0, (tokens,))
    # Attentions of windows hold the index of a bias for every pair of tokens.
    indices = (buffer.numel() for buffer in attention.buffers() if not buffer.is_floating_point())
    layouts += [(2, math.isqrt(n)) for n in indices if 1 < math.isqrt(n) ** 2 == n]
    relative = _normal(1024, inputs_of(projections.query), generator=generator)  # DeBERTa's, of distances up to 512
    for layout, crossing, masked in itertools.product(layouts, (False, True), (False, True)):
        query, key, value = (
            _normal(*layout, inputs_of(projection), generator=generator)
            for projection in (projections.query, projections.key, projections.value)
        )
        cosine, sine = (_normal(*layout, rotation, generator=generator) for _ in range(2))
        given: dict[str, Any] = dict.fromkeys(required, query if crossing else None) | {
            "position_embeddings": (cosine, sine) if rotation else None,
            "sinusoidal_pos": _normal(layout[-1], rotation, generator=generator) if rotation else None,
            "position_ids": torch.arange(layout[-1]).expand(layout),
            "attention_mask": torch.ones(1, 1, tokens, tokens) if masked else None,
            "mask": torch.ones(layout) if masked else None,
            **{name: torch.zeros(()) for name in names if name.startswith("rel_")},
            "rel_embeddings": relative,
            "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32),
            "max_seqlen": tokens,
            **dict.fromkeys(("height", "width"), math.isqrt(tokens)),
            **dict.fromkeys(("key", "keys", "key_tensor"), key),
            **dict.fromkeys(("value", "values", "value_tensor"), value),
            **{name: key for name in names if crossing and name.endswith("_states")},
            **{name: {} for name in required if name.startswith("shared")},
            named[0].name: query,
        }
        yield {name: argument for name, argument in given.items() if name in names}


def _outputs(twin: nn.Module, arguments: Mapping[str, Any]) -> list[Tensor]:
    """All that a call hands on: what it returns, and what it puts into a dictionary that layers share."""
    arguments = copy.deepcopy(dict(arguments))
    returned = twin(**arguments)
    return [*_tensors(returned), *_tensors([value for value in arguments.values() if isinstance(value, dict)])]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value.double()
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(inner)


def _distance(outputs: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(outputs, expected, strict=True)
    return max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
