"""Exchanging layers of a model in place, with everything that names them: ties, and the record in its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_fnl.layers import Factorized, FactorizedConv2d, FactorizedMatrix, TensorizedConv2d
from hf_fnl.layers.whole import is_partitioned

QUANT_METHOD = "hf_fnl"  # what `config.json` calls a model that went through surgery


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` wrapped, which compiles anew when its layers change."""
    return getattr(model, "_orig_mod", model)


def swap_(model: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> None:
    """Put new layers in the places of old ones, under all their names; biases stay the same parameters.

    The names of tied weights and the record in a Transformers model's configuration follow.
    """
    nested = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    declared = {module: module.get_expanded_tied_weights_keys() for module in nested}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in successors:
            successor = successors[module]
            if getattr(module, "bias", None) is not None:
                successor.bias = module.bias
            model.set_submodule(name, successor)
    for module, ties in declared.items():
        if (renamed := _renamed(module, ties)) != ties:
            module._tied_weights_keys = renamed
        module.all_tied_weights_keys = _renamed(module, module.all_tied_weights_keys)
    if isinstance(model, PreTrainedModel):
        _write_record_(model)


def _renamed(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """Ties of weights that are factors now, or no longer are, under the names that they have."""
    modules = dict(model.named_modules(remove_duplicate=False))
    renamed = {}
    for target, source in ties.items():
        (holder, _, attribute), (origin, _, _) = target.rpartition("."), source.rpartition(".")
        attributes: tuple[str, ...] = (attribute,)
        if isinstance(modules.get(holder), Factorized):
            attributes = ("U", "V") if attribute == "weight" else attributes
        elif attribute in ("U", "V"):
            attributes = ("weight",)
        if attributes == (attribute,):
            renamed[target] = source
        else:
            renamed |= {f"{holder}.{name}": f"{origin}.{name}" for name in attributes}
    return renamed


def share_factors_(layer: Factorized, other: Factorized) -> Factorized:
    """Let a layer hold the factors of another; returns it."""
    for name, factor in other.named_parameters(recurse=False):
        if name != "bias":
            setattr(layer, name, factor)
    return layer


def layer_record(layer: Factorized) -> dict[str, Any]:
    """What it takes to make the layer again in the place of the dense one."""
    record: dict[str, Any] = {"rank": layer.rank}
    if isinstance(layer, FactorizedConv2d | TensorizedConv2d):
        record["scheme"] = layer.scheme
    if isinstance(layer, FactorizedMatrix):
        options = {"deep": layer.M is not None, "overcomplete": layer.overcomplete}
        record |= {option: True for option, is_set in options.items() if is_set}
    return record


def _write_record_(model: PreTrainedModel) -> None:
    """Tell the configuration which layers are factorized: ``from_pretrained`` reads it as a quantization method's."""
    layers = {name: layer_record(layer) for name, layer in model.named_modules() if isinstance(layer, Factorized)}
    if layers:
        model.config.quantization_config = {"quant_method": QUANT_METHOD, "layers": layers}
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def check_whole(model: nn.Module, action: str) -> None:
    """Raise a ``ValueError`` if this process does not hold all of a model, which ``action`` needs."""
    if any(is_partitioned(parameter) or isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            f"{action} needs whole parameters, but those of this {type(model).__name__} are divided among processes: "
            "do it in one process first (`hf-fnl factorize`, `hf-fnl merge`), then load what it wrote"
        )


def check_not_quantized(model: nn.Module) -> None:
    """Raise a ``ValueError`` if the configuration of a Transformers model holds another method's record."""
    other = getattr(getattr(model, "config", None), "quantization_config", None)
    method = dict(other).get("quant_method") if other else QUANT_METHOD
    if method != QUANT_METHOD:
        raise ValueError(f"{type(model).__name__} is quantized with {method}; factorize it before it is quantized")
