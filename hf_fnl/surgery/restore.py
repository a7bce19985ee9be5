"""The ways back from surgery: to plain layers, and from a record to the same factorized layers in another model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_fnl.layers import Factorized
from hf_fnl.surgery.select import empty_successor, successor_of, weights
from hf_fnl.surgery.swap import layer_record, share_factors_, swap_, unwrapped


@torch.no_grad()
def merge_(model: nn.Module) -> list[str]:
    """Multiply every product of a model out, in place: plain layers of the stock classes, with the same outputs.

    Args:
        model: A model that holds factorized layers. Layers that share factors share a weight afterwards.

    Returns:
        Names of the layers that are plain now.

    Raises:
        ValueError: If there is no factorized layer, or the model is of a class of ours, which has ``merge()``.
    """
    model = unwrapped(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}
    if not layers or "" in layers:
        remedy = "; use its to_dense()" if layers else ""
        raise ValueError(f"{type(model).__name__} holds no factorized layer that could be merged{remedy}")
    if callable(getattr(model, "merge", None)):
        raise ValueError(f"a {type(model).__name__} is factorized by its class; merge() returns the stock model")
    weight_of: dict[Tensor, nn.Parameter] = {}
    successors: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        dense = layer.to_dense()
        dense.weight = weight_of.setdefault(layer.factors()[0], dense.get_parameter("weight"))
        successors[layer] = dense
    swap_(model, successors)
    return list(layers)


def restore_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Put empty factorized layers into a freshly built model, in place, before its weights are loaded.

    Nothing is drawn or decomposed. A name in the record may have the prefix of a model's backbone too many, or lack it,
    as between a backbone and a model with a head; layers that the model does not have are passed over.

    Args:
        model: The dense model, on the meta device or not.
        record: What ``to_dict()`` of a :class:`~hf_fnl.surgery.Factorization` returned, or the ``quantization_config``
            of a Transformers model.

    Raises:
        ValueError: If the record does not fit the model.
    """
    ties = getattr(model, "all_tied_weights_keys", {})
    find = _finder(model)
    entries = {layer: (name, entry) for name, entry in record["layers"].items() if (layer := find(name)) is not None}
    for holders in weights(model, ties):
        layers = [layer for layer in holders.values() if layer is not None]
        if named := [entries[layer] for layer in layers if layer in entries]:
            entries |= {layer: entries.get(layer, named[0]) for layer in layers}
    successors: dict[nn.Module, nn.Module] = {}
    first: dict[Tensor, Factorized] = {}
    for dense, (name, entry) in entries.items():
        if isinstance(dense, Factorized) and layer_record(dense) == dict(entry):
            continue
        layer = _empty_layer(dense, name, entry)
        successors[dense] = share_factors_(layer, first.setdefault(dense.get_parameter("weight"), layer))
    swap_(model, successors)


def _finder(model: nn.Module) -> Callable[[str], nn.Module | None]:
    """Finds the module of a name, with or without the prefix of the backbone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def find(name: str) -> nn.Module | None:
        return next((modules[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in modules), None)

    return find


def _empty_layer(dense: nn.Module, name: str, entry: Mapping[str, Any]) -> Factorized:
    if successor_of(type(dense)) is None:
        raise ValueError(f"the record of {name} says {dict(entry)}, where the model has a {type(dense).__name__}")
    try:
        return empty_successor(dense, **entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the record of {name} says {dict(entry)}, which does not fit {dense}: {error}") from error
