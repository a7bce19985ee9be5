"""The record of surgery in a configuration, read from the modules of its model whenever it is asked for."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

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
Quantization: TypeAlias = Mapping[str, Any] | QuantizationConfigMixin
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
    return {name: layer_record(layer) for name, layer in model.named_modules() if isinstance(layer, MADE)}


class SurgeryConfig(Mapping[str, Any], QuantizationConfigMixin):
    """The ``quantization_config`` of a model with factorized layers.

    In a model's configuration it lists the layers that the model has at the moment. That holds, too, after the model
    is copied, wrapped, or changed by other code. In a copy of the configuration alone it is a plain dictionary, and as
    read from ``config.json`` it lists what stands there. A model that was quantized after surgery has the configuration
    of that inside of this one.

    Args:
        layers: Rank, scheme of a convolution and other options, by the name of the layer.
        quant_method: Name of the method, ``"hf_fnl"``.
        quantization: The ``quantization_config`` of another method that the factorized model went through, if any.
        quantize: Quantize in loading, for the weights in the files are not.
    """

    def __init__(
        self,
        layers: Layers,
        quant_method: str = QUANT_METHOD,
        quantization: Quantization | None = None,
        quantize: bool = False,
    ) -> None:
        self.quant_method = quant_method
        self.quantize = quantize
        self._written, self._quantization = layers, quantization
        self._model: weakref.ref[PreTrainedModel] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> SurgeryConfig:
        """The record of a model; it does not keep the model alive."""
        record = cls(layer_records(model))
        record._model = weakref.ref(model)
        return record

    @property
    def model(self) -> PreTrainedModel | None:
        """The outermost model that the configuration belongs to, ``None`` where the record is only what is written."""
        return None if self._model is None else self._model()

    @property
    def layers(self) -> Layers:
        """The records of the layers, by the names that they have in the model that is saved."""
        holders = self._holders()
        if not holders:
            return self._written
        # A backbone shares its configuration with the model around it. `save_pretrained` writes the class of what it
        # saves into the configuration just before it writes that.
        saved = [model for model in holders if [type(model).__name__] == model.config.architectures]
        return layer_records(saved[0] if len(saved) == 1 else holders[0])

    @property
    def quantization(self) -> Quantization | None:
        """The configuration of the other method by which the model is quantized, ``None`` if there is none."""
        if self.model is None:
            return self._quantization
        quantizer = getattr(self.model, "hf_quantizer", None)
        return None if quantizer is None else quantizer.quantization_config

    def _holders(self) -> list[PreTrainedModel]:
        """The models that have the configuration, the outermost first."""
        return [] if self.model is None else [m for m in models_in(self.model) if m.config is self.model.config]

    def to_dict(self) -> Any:
        """The record, ready for JSON; ``None`` where no layer is factorized."""
        layers = {name: dict(record) for name, record in self.layers.items()}
        if not layers:
            return None
        record: dict[str, Any] = {"quant_method": self.quant_method, "layers": layers}
        if (other := self.quantization) is not None:
            record["quantization"] = dict(other) if isinstance(other, Mapping) else other.to_dict()
            record |= {"quantize": True} if self.quantize else {}
        return record

    def __getitem__(self, key: str) -> Any:
        return (self.to_dict() or {})[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict() or {})

    def __len__(self) -> int:
        return len(self.to_dict() or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._model is None:
            return SurgeryConfig(self._written, quantization=self._quantization, quantize=self.quantize)
        for model in self._holders():
            if id(model) in memo:  # the model is being copied, too
                record = SurgeryConfig(layer_records(model), quantization=self.quantization)
                record._model = weakref.ref(memo[id(model)])
                return record
        return self.to_dict()

    def __reduce__(self) -> Any:
        return _plain, (self.to_dict(),)


def _plain(record: Any) -> Any:
    return record


def models_in(module: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models inside a module, itself included, each before those inside of it."""
    return [inner for inner in module.modules() if isinstance(inner, PreTrainedModel)]


def live_models(module: nn.Module) -> list[PreTrainedModel]:
    """The Transformers models inside a module, and all others that there are: one of them may hold the module.

    A module does not know what holds it, so these are looked for among all objects.
    """
    if gc.get_freeze_count() and not isinstance(module, PreTrainedModel):
        warnings.warn(
            f"after gc.freeze() it cannot be told which model holds this {type(module).__name__}: if one of "
            "Transformers does, pass that model, or its configuration will not say what was factorized",
            stacklevel=3,
        )
    objects, classes = gc.get_objects(), set(_subclasses(PreTrainedModel))
    found = itertools.compress(objects, map(classes.__contains__, map(type, objects)))
    made = (model for model in found if "_modules" in vars(model))  # and not one whose construction failed
    return list(dict.fromkeys([*models_in(module), *made]))


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _subclasses(subclass)


def models_with(models: Iterable[PreTrainedModel], layers: Iterable[nn.Module]) -> list[PreTrainedModel]:
    """Return the models that hold one of some layers."""
    sought = set(layers)
    return [model for model in models if not sought.isdisjoint(model.modules())]


def update_records_(models: Iterable[PreTrainedModel]) -> None:
    """Give models whose layers changed a configuration of their own that says which layers are factorized.

    What shares a configuration inside a model shares it afterwards, too; what is outside keeps the one it had.

    Args:
        models: Models inside each other count as one, under the outermost.
    """
    models = list(models)
    inner = {nested for model in models for nested in models_in(model)[1:]}
    for root in models:
        if root not in inner:
            _own_configs_(root)
            holders: dict[int, PreTrainedModel] = {}
            for model in models_in(root):
                first = holders.setdefault(id(model.config), model)
                if first is not model and model not in set(first.modules()):
                    if layer_records(model) == layer_records(first):
                        continue
                    _copy_configs_(model, {})  # two parts side by side that differ now
                    first = holders[id(model.config)] = model
                if first is model:
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
    record = getattr(model.config, "quantization_config", None)
    if any(isinstance(layer, MADE) for layer in model.modules()):
        if not isinstance(record, SurgeryConfig) or record.model is not model:
            model.config.quantization_config = SurgeryConfig.of(model)
    elif record is not None and method_of(record) == QUANT_METHOD:
        del model.config.quantization_config


def _own_configs_(root: PreTrainedModel) -> None:
    """Give a model and what is inside of it configurations that nothing outside has."""
    own: dict[int, PreTrainedConfig] = {}

    def keep(config: PreTrainedConfig) -> None:
        own[id(config)] = config
        for value in vars(config).values():
            if isinstance(value, PreTrainedConfig):
                keep(value)

    inside = models_in(root)
    for model in inside:
        record = getattr(model.config, "quantization_config", None)
        if isinstance(record, SurgeryConfig) and record.model in inside:
            keep(model.config)
    _copy_configs_(root, own)


def _copy_configs_(model: PreTrainedModel, memo: dict[int, Any]) -> None:
    """Replace every configuration that a module inside a model holds by a copy, except for those in ``memo``."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, PreTrainedConfig):
                setattr(module, name, copy.deepcopy(value, memo))
