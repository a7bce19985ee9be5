"""All products of a model, and the attentions in which none can be told."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from hf_fnl.attention.adapters import KnownAttention, attention_of
from hf_fnl.attention.parts import parts_of
from hf_fnl.attention.products import Factor, Product
from hf_fnl.attention.selectors import KINDS, Selector
from hf_fnl.layers import Factorized
from hf_fnl.layers.partitioned import full_shape
from hf_fnl.utils.suggest import listed


def find_products(model: nn.Module, kinds: Iterable[str] | None = None) -> list[Product]:
    """List the products of a model, stock or ours, in the order of its modules.

    Parameters that are tied appear once, under the name that ``named_parameters`` gives them. The projections of an
    attention are known by their names, and are products only if it computes with them as such: a small copy of it with
    random weights gives the same outputs for ``V R`` and ``O R^-T`` as for ``V`` and ``O``, and for ``Q R`` and
    ``K R^-T``, with any invertible ``R`` for each head. Heads that are mixed, gated or normalized in between have no
    such product, nor have queries and keys under rotary positions. :func:`~hf_fnl.attention.register_attention` adds
    attentions of other layouts, or those that are to count all the same.

    Args:
        model: Any module; unwrapped, so that names are those of its own ``named_parameters``.
        kinds: Any of ``"linear"``, ``"embedding"``, ``"conv"``, ``"qk"``, ``"ov"`` and ``"tensor"``, each alone or in
            one part of the model, as in ``"ov:encoder"``; see
            :class:`~hf_fnl.attention.selectors.Selector`. All that the model has unless given.

    Raises:
        ValueError: If a kind or part is unknown, or the model has no product that was asked for, or none at all.

    Warns:
        UserWarning: If ``"qk"`` or ``"ov"`` is wanted and the model has, besides, attentions without such a product, or
            of an unknown layout.
    """
    kinds = [kinds] if isinstance(kinds, str) else kinds
    wanted = [Selector.parse(kind, "kind of product") for kind in (KINDS if kinds is None else kinds)]
    attentions = {path: known for path, module in model.named_modules() if (known := attention_of(module)) is not None}
    products = list(_distinct(_all_products(model, attentions)))
    complaint = _complaint(model, attentions, {selector.kind for selector in wanted} & {"qk", "ov"})
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
        places[product.places].append(product)
    for same in places.values():
        parts = {product.part for product in same} - {None}
        yield replace(same[0], part=parts.pop() if len(parts) == 1 else None)


def _all_products(model: nn.Module, attentions: dict[str, KnownAttention]) -> Iterator[Product]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = parts_of(model)
    for path, module in model.named_modules():
        if isinstance(module, Factorized):
            yield Product(path, module.kind, tuple(Factor(names[id(p)]) for p in module.factors()), parts[path])
        if path in attentions:
            known = attentions[path]
            products = known.projections.products(path, names, parts[path])
            yield from (product for product in products if product.kind in (known.kinds or ()))


def _complaint(model: nn.Module, known: Mapping[str, KnownAttention], kinds: set[str]) -> str:
    """Describe the attentions that have no product of a wanted kind; empty if there are none."""
    if not kinds:
        return ""
    left_out: dict[str, list[str]] = defaultdict(list)
    for path, attention in known.items():
        wanted = kinds - attention.projections.factorized_kinds()
        if wanted and attention.kinds is None:
            left_out["attentions that could not be run to see how they compute"].append(path)
        for kind in sorted(wanted - set(wanted if attention.kinds is None else attention.kinds)):
            left_out[f"attentions that do not compute by {kind} products"].append(path)
    seen = list(known)
    for path, module in model.named_modules():
        if _looks_like_attention(module) and not any(_within(path, other) or _within(other, path) for other in seen):
            seen.append(path)
            left_out["attentions of unknown layout"].append(path)
    if not left_out:
        return ""
    reasons = " and ".join(
        f"{reason}, which are left out: {listed(f'{type(model.get_submodule(p)).__name__} ({p})' for p in paths)}"
        for reason, paths in left_out.items()
    )
    return f"{type(model).__name__} has {reasons}; name the projections of those that do with register_attention"


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module is called one and holds at least inputs and an output, none of which somebody has factorized."""
    if not type(module).__name__.endswith("Attention"):
        return False
    matrices = sum(len(full_shape(parameter)) == 2 for parameter in module.parameters())
    return matrices >= 2 and not any(isinstance(inner, Factorized) for inner in module.modules())


def _within(path: str, other: str) -> bool:
    return not other or f"{path}.".startswith(f"{other}.")
