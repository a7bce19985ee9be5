"""The ways back from surgery: to plain layers, and from a record to the same factorized layers in another model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers import Factorized, FactorizedLinear, HeadProjection, LinearPair
from hf_fnl.surgery.record import MADE, layer_record, models_in
from hf_fnl.surgery.select import weights
from hf_fnl.surgery.swap import (
    check_present,
    held_weights,
    parameters_around,
    replacement_obstacle,
    swap_and_record_,
    unwrapped,
)
from hf_fnl.surgery.targets import Replacements, empty_layer, factorized_class, share_factors_


@torch.no_grad()
def merge_(model: nn.Module) -> list[str]:
    """Make every layer of a model plain, in place: factors are multiplied out, narrow heads filled up with zeros.

    The outputs are the same.

    An adapter of PEFT is merged into plain layers only; into factors it would have to be approximated, so that PEFT's
    own merges raise an error there. After ``merge_`` they are exact. A LoRA of rank ``s`` around a product of rank
    ``r`` is then held exactly by factors of rank ``r + s``::

        merge_(adapted)
        model = adapted.merge_and_unload()
        factorize_(model, FactorizationConfig(rank=r + s, include=[...]))

    Args:
        model: A model that holds factorized layers, or PEFT's around one. Layers that share factors share a weight
            afterwards.

    Returns:
        Names of the layers that are plain now.

    Raises:
        ValueError: If there is no factorized layer, the model is of a class of ours, which has ``merge()``, or is
            offloaded or divided among processes, or something would be lost with a factorized layer.
    """
    model = unwrapped(model)
    layers: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, MADE)}
    if not layers or "" in layers:
        remedy = "; use its to_dense()" if layers else ""
        raise ValueError(f"{type(model).__name__} holds no factorized layer that could be merged{remedy}")
    if callable(getattr(model, "merge", None)):
        raise ValueError(f"a {type(model).__name__} is factorized by its class; merge() returns the stock model")
    check_present(model, "merge_")
    outside = parameters_around(model)
    for name, layer in layers.items():
        reason = replacement_obstacle(layer)
        if other := next((outside[factor] for factor in held_weights(layer) if factor in outside), None):
            reason = f"its factor is also {other}, outside of what is merged: pass the model that holds both"
        if reason is not None:
            raise ValueError(f"{name} cannot be merged: {reason}")
    weight_of: dict[Tensor, nn.Parameter] = {}
    plain: Replacements = {}
    for layer in layers.values():
        dense = layer.to_dense()
        dense.weight = weight_of.setdefault(held_weights(layer)[0], dense.get_parameter("weight"))
        plain[layer] = dense
    swap_and_record_(model, plain)
    return list(layers)


def restore_(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Put empty factorized layers into a freshly built model, in place, before its weights are loaded.

    Nothing is drawn or decomposed. A name in the record may have the path to a model inside of another too many, or
    lack it, as between a backbone and a model with a head; layers that the model does not have are passed over.

    Args:
        model: The dense model, on the meta device or not.
        record: What ``to_dict()`` of a :class:`~hf_fnl.surgery.Factorization` returned, or the ``quantization_config``
            of a Transformers model.

    Raises:
        ValueError: If the record does not fit the model.
    """
    swap_and_record_(model, empty_layers(model, record["layers"]))


def empty_layers(model: nn.Module, record: Mapping[str, Mapping[str, Any]]) -> Replacements:
    """Return the layers that a record says, not set yet, by the dense ones in whose places they belong."""
    ties = getattr(model, "all_tied_weights_keys", {})
    entries = {layer: (name, record[name]) for name, layer in _found(model, record).items()}
    for holders in weights(model, ties).values():
        layers = [layer for layer in holders.values() if layer is not None]
        if named := [entries[layer] for layer in layers if layer in entries]:
            entries |= {layer: entries.get(layer, named[0]) for layer in layers}
    new: Replacements = {}
    first: dict[Tensor, Factorized] = {}
    for dense, (name, entry) in entries.items():
        if isinstance(dense, MADE) and layer_record(dense) == dict(entry):
            continue
        layer = _empty_layer(dense, name, entry)
        if isinstance(layer, Factorized):
            share_factors_(layer, first.setdefault(dense.get_parameter("weight"), layer))
        new[dense] = layer
    return new


def _found(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules of a model that names mean, which may have a path too many or lack the one to an inner model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    inner = set(models_in(model)[1:])
    paths = [backbone, *(f"{name}." for name, module in modules.items() if module in inner)]

    def find(path: str) -> dict[str, nn.Module]:
        """The modules of the names that begin with a path, by what follows it."""
        found = {}
        for name in (name for name in names if name.startswith(path)):
            tail = name.removeprefix(path)
            candidates = (tail, backbone + tail, tail.removeprefix(backbone), *(inside + tail for inside in paths))
            if (match := next((n for n in candidates if n in modules), None)) is not None:
                found[name] = modules[match]
        return found

    # The record of a model around this one: all names that lead through one module mean layers of this one.
    leading = {name[: end + 1]: None for name in names for end, letter in enumerate(name) if letter == "."}
    found = find("")
    for path in leading:
        below = find(path)
        if len(below) > len(found) and len(below) == sum(name.startswith(path) for name in names):
            found = found | below
    return found


def _empty_layer(dense: nn.Module, name: str, entry: Mapping[str, Any]) -> nn.Module:
    is_pair = bool(entry.get("linear"))
    if is_pair:
        fits = isinstance(dense, nn.Linear | Conv1D | FactorizedLinear)
    else:
        fits = isinstance(dense, nn.Linear | Conv1D) if "heads" in entry else bool(factorized_class(type(dense)))
    if not fits:
        raise ValueError(f"the record of {name} says {dict(entry)}, where the model has a {type(dense).__name__}")
    if reason := replacement_obstacle(dense):
        raise ValueError(f"{name} cannot be factorized: {reason}")
    try:
        if is_pair:
            return LinearPair.empty_like(dense, **{key: value for key, value in entry.items() if key != "linear"})
        return HeadProjection.empty_like(dense, **entry) if "heads" in entry else empty_layer(dense, **entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the record of {name} says {dict(entry)}, which does not fit {dense}: {error}") from error
