"""The layers of a model whose weights pruning and DO-Conv replace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def choose_layers(
    model: nn.Module, layers: Collection[nn.Module] | None, *, fits: Callable[[nn.Module], bool], wanted: str
) -> dict[str, Any]:
    """Return the chosen layers of a model by name, in the order of the model.

    Args:
        model: Any module.
        layers: Modules of the model; ``None`` for all that fit.
        fits: Whether a module is of the kind that is wanted.
        wanted: That kind in words, in the plural, for messages.

    Raises:
        ValueError: If there is none, one of ``layers`` is not in the model or does not fit, or a weight is not the
            parameter of one layer alone: tied, pruned or parametrized.
    """
    present = {name: module for name, module in model.named_modules() if fits(module)}
    meant = set(present.values() if layers is None else layers)
    if strange := meant.difference(present.values()):
        raise ValueError(f"layers must be {wanted} of the {type(model).__name__}, got {next(iter(strange))}")
    chosen = {name: module for name, module in present.items() if module in meant}
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no {wanted}" if layers is None else f"layers names no {wanted}")
    holders = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, layer in chosen.items():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is None:
            raise ValueError(f"the weight of {name} is pruned or parametrized already: make it a plain one first")
        if holders[weight] > 1:
            raise ValueError(f"the weight of {name} is tied to another one: leave it out of layers")
    return chosen
