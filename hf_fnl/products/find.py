"""All products of a model, and the attentions in which none can be told."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import nn

from hf_fnl.layers import Factorized
from hf_fnl.layers.whole import whole_shape
from hf_fnl.products.adapters import attention_of
from hf_fnl.products.attention import AttentionProjections
from hf_fnl.products.core import Factor, Product
from hf_fnl.products.parts import parts_of
from hf_fnl.selectors import KINDS, Selector


def find_products(model: nn.Module, kinds: Iterable[str] | None = None) -> list[Product]:
    """List the products of a model, stock or ours, in the order of its modules.

    Parameters that are tied appear once, under the name that ``named_parameters`` gives them. An attention is known
    by the layout of its layers; see :func:`~hf_fnl.products.register_attention` for others. Its products are those of
    its weights, before anything that it does to queries and keys, as rotary embeddings and normalizations do.

    Args:
        model: Any module; unwrapped, so that names are those of its own ``named_parameters``.
        kinds: Any of ``"linear"``, ``"embedding"``, ``"conv"``, ``"qk"``, ``"ov"`` and ``"tensor"``, each alone or in
            one part of the model, as in ``"ov:encoder"``; see :class:`~hf_fnl.selectors.Selector`. All that the model
            has unless given.

    Raises:
        ValueError: If a kind or part is unknown, or the model has no product that was asked for, or none at all.

    Warns:
        UserWarning: If ``"qk"`` or ``"ov"`` is wanted and the model has, besides, attentions of an unknown layout.
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    wanted = [Selector.parse(kind, "kind of product") for kind in (KINDS if kinds is None else kinds)]
    attentions = {path: known for path, module in model.named_modules() if (known := attention_of(module)) is not None}
    products = list(_distinct(_all_products(model, attentions)))
    complaint = _complaint(model, attentions) if any(selector.kind in ("qk", "ov") for selector in wanted) else ""
    found = {selector: [p for p in products if selector.matches(p.kind, p.part)] for selector in wanted}
    if missing := [str(selector) for selector in wanted if not found[selector] and (kinds is not None or not products)]:
        present = sorted({str(Selector(p.kind, p.part)) for p in products})
        raise ValueError(
            f"{type(model).__name__} has no product of kind {', '.join(missing)}; "
            f"it has: {', '.join(present) or 'none'}" + (f". {complaint}" if complaint else "")
        )
    if complaint:
        warnings.warn(complaint, stacklevel=2)
    return [p for p in products if any(selector.matches(p.kind, p.part) for selector in wanted)]


def _distinct(found: Iterable[Product]) -> Iterator[Product]:
    """Each product once; one that several parts of the model hold belongs to none of them."""
    places: dict[tuple[Factor, ...], list[Product]] = defaultdict(list)
    for product in found:
        places[product.parts].append(product)
    for same in places.values():
        parts = {product.part for product in same} - {None}
        yield replace(same[0], part=parts.pop() if len(parts) == 1 else None)


def _all_products(model: nn.Module, attentions: dict[str, AttentionProjections]) -> Iterator[Product]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = parts_of(model)
    for path, module in model.named_modules():
        if isinstance(module, Factorized):
            yield Product(path, module.kind, tuple(Factor(names[id(p)]) for p in module.factors()), parts[path])
        if path in attentions:
            yield from attentions[path].products(path, names, parts[path])


def _complaint(model: nn.Module, known: Iterable[str]) -> str:
    """What to say of the attentions that no adapter knows; empty if there are none."""
    seen, unknown = list(known), defaultdict(list)
    for path, module in model.named_modules():
        if _looks_like_attention(module) and not any(_within(path, other) or _within(other, path) for other in seen):
            seen.append(path)
            unknown[type(module).__name__].append(path)
    if not unknown:
        return ""
    listed = "; ".join(f"{name} ({', '.join(paths)})" for name, paths in unknown.items())
    return (
        f"{type(model).__name__} has attentions of unknown layout, which are left out: {listed}; "
        "name their projections with register_attention"
    )


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module is called one and holds at least inputs and an output, none of which somebody has factorized."""
    if not type(module).__name__.endswith("Attention"):
        return False
    matrices = sum(len(whole_shape(parameter)) == 2 for parameter in module.parameters())
    return matrices >= 2 and not any(isinstance(inner, Factorized) for inner in module.modules())


def _within(path: str, other: str) -> bool:
    return not other or f"{path}.".startswith(f"{other}.")
