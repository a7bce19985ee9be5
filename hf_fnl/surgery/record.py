"""The record of surgery in the configuration of a model: its layers with factors or narrow heads."""

from __future__ import annotations

import copy
import gc
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_fnl.layers import (
    Factorized,
    FactorizedConv2d,
    FactorizedMatrix,
    HeadProjection,
    LinearPair,
    TensorizedConv2d,
)

QUANT_METHOD = "hf_fnl"  # what `config.json` calls a model that went through surgery

Layers = Mapping[str, Mapping[str, Any]]
MADE = (Factorized, HeadProjection, LinearPair)  # what surgery puts into models


def layer_record(layer: nn.Module) -> dict[str, Any]:
    """Return what it takes to make a layer with factors or narrow heads again in the place of the dense one."""
    if isinstance(layer, LinearPair):
        return {"rank": layer.rank, "linear": True}
    if isinstance(layer, HeadProjection):
        heads = [[count, rank] for count, rank in layer.heads]
        return {"heads": heads, "width": layer.dense_width, "is_output": layer.is_output}
    assert isinstance(layer, Factorized)
    record: dict[str, Any] = {"rank": layer.rank}
    if isinstance(layer, FactorizedConv2d | TensorizedConv2d):
        record["scheme"] = layer.scheme
    if isinstance(layer, FactorizedMatrix):
        options = {"deep": layer.M is not None, "overcomplete": layer.overcomplete}
        record |= {option: True for option, is_set in options.items() if is_set}
    return record


def layer_records(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the records of all layers of a model that surgery may have made, by name."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MADE)}
    return {without_adapters(name): layer_record(layer) for name, layer in layers.items()}


def without_adapters(name: str) -> str:
    """The name of a layer in a model without the adapters of PEFT, which hold the layers that they are put around."""
    return re.sub(r"\.(base_layer|original_module)\b", "", name)


def models_in(module: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models inside a module, itself included, each before those inside of it."""
    return [inner for inner in module.modules() if isinstance(inner, PreTrainedModel)]


def models_with(layers: Iterable[nn.Module], inside: nn.Module) -> list[PreTrainedModel]:
    """Return the Transformers models, inside a module or around it, that hold one of some layers.

    A module does not know what holds it, so models are looked for among all objects.
    """
    sought = set(layers)
    objects, classes = gc.get_objects(), set(subclasses(PreTrainedModel))
    found = itertools.compress(objects, map(classes.__contains__, map(type, objects)))
    made = (model for model in found if "_modules" in vars(model))  # and not one whose construction failed
    models = dict.fromkeys([*models_in(inside), *made])
    return [model for model in models if not sought.isdisjoint(model.modules())]


def subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    """A class, and all that are derived from it."""
    yield cls
    for subclass in cls.__subclasses__():
        yield from subclasses(subclass)


def update_records_(models: Iterable[PreTrainedModel]) -> None:
    """Give models whose layers changed a configuration of their own that says which layers are factorized.

    What shares a configuration inside a model shares it afterwards, too; what is outside keeps the one it had.

    Args:
        models: Models inside each other count as one, under the outermost.
    """
    models = list(models)
    inner = {nested for model in models for nested in models_in(model)[1:]}
    for root in (model for model in models if model not in inner):
        copies: dict[int, Any] = {}
        for module in root.modules():
            for name, value in list(vars(module).items()):
                if isinstance(value, PreTrainedConfig):
                    setattr(module, name, copy.deepcopy(value, copies))
        outermost = {id(model.config): model for model in reversed(models_in(root))}
        for model in outermost.values():
            _update_record_(model)


def method_of(record: Any) -> str:
    """The name of the method that a ``quantization_config`` belongs to, be it an object or a dictionary."""
    method = record.get("quant_method", QUANT_METHOD) if isinstance(record, dict) else record.quant_method
    return str(getattr(method, "value", method))


def quantization_of(record: Any) -> Any:
    """The ``quantization_config`` of another method that a configuration's is or has inside, ``None`` if none is."""
    if record is None or method_of(record) != QUANT_METHOD:
        return record
    return record.get("quantization") if isinstance(record, dict) else record.quantization


def _update_record_(model: PreTrainedModel) -> None:
    before = getattr(model.config, "quantization_config", None)
    if layers := layer_records(model):
        record: dict[str, Any] = {"quant_method": QUANT_METHOD, "layers": layers}
        if (other := quantization_of(before)) is not None:
            record["quantization"] = other if isinstance(other, dict) else other.to_dict()
        model.config.quantization_config = record
    elif before is not None and method_of(before) == QUANT_METHOD:
        del model.config.quantization_config
