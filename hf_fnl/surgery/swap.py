"""Exchanging layers of a model in place, with all that names them or hangs on them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention.value_cache import narrow_value_caches_
from hf_fnl.layers import (
    Factorized,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    HeadProjection,
    LinearPair,
    TensorizedConv2d,
)
from hf_fnl.layers.partitioned import is_partitioned
from hf_fnl.surgery.record import method_of, models_with, quantization_of, update_records_, without_adapters

# What is called before or after a layer's forward or backward pass, and knows nothing of its parameters.
_CARRIED_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
_HOOKS_OF_STATE = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OFFLOADED = (
    "accelerate offloads: call accelerate.hooks.remove_hook_from_submodules(model) first, or load the model without a "
    "device_map that names 'cpu' or 'disk'"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` wrapped, which compiles anew when its layers change."""
    return getattr(model, "_orig_mod", model)


def swap_(model: nn.Module, replacements: Mapping[nn.Module, nn.Module], nested: Sequence[PreTrainedModel]) -> None:
    """Put new layers in the places of old ones, under all their names; biases stay the same parameters.

    Hooks and attributes go over to the new layers, and the names of tied weights follow.

    Args:
        model: What holds the layers.
        replacements: The new layers by the old ones.
        nested: The Transformers models that hold one of the old layers, and declare ties by their names.
    """
    declared = {module: _declared_ties(module) for module in nested}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            new = replacements[module]
            narrow = isinstance(module, HeadProjection) or isinstance(new, HeadProjection)
            if not narrow and getattr(module, "bias", None) is not None:
                new.bias = module.bias
            model.set_submodule(name, new)
    for module, new in replacements.items():
        _carry_over_(module, new)
    if any(isinstance(layer, HeadProjection) for layer in (*replacements, *replacements.values())):
        narrow_value_caches_(model)
    for owner, ties in declared.items():
        if (renamed := _renamed(owner, ties)) != ties:
            owner._tied_weights_keys = renamed
        owner.all_tied_weights_keys = _renamed(owner, owner.all_tied_weights_keys)


def swap_and_record_(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """As :func:`swap_`, in the models around ``model``, too; their configurations then say what is factorized.

    Args:
        model: What holds the layers.
        replacements: The new layers by the old ones.
    """
    holders = models_with(replacements, model)
    swap_(model, replacements, holders)
    update_records_(holders)


def _declared_ties(model: PreTrainedModel) -> Mapping[str, str]:
    """The names of tied weights, each with that which it is tied to; under an adapter those that the model had."""
    try:
        return model.get_expanded_tied_weights_keys()
    except ValueError:  # of names that an adapter around a layer makes longer
        return model.all_tied_weights_keys


def _renamed(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    """Ties of weights that are factors now, or no longer are, under the names that they have.

    Where only one of two layers has factors there is no tie.
    """
    modules = {without_adapters(name): module for name, module in model.named_modules(remove_duplicate=False)}
    renamed = {}
    for target, source in ties.items():
        (holder, _, attribute), (origin, _, _) = target.rpartition("."), source.rpartition(".")
        are_factorized = {isinstance(modules.get(name), Factorized) for name in (holder, origin)}
        if attribute not in ("weight", "U", "V"):
            renamed[target] = source
        elif len(are_factorized) == 1:
            names = ("U", "V") if are_factorized == {True} else ("weight",)
            renamed |= {f"{holder}.{name}": f"{origin}.{name}" for name in names}
    return renamed


def parameters_around(model: nn.Module) -> dict[Tensor, str]:
    """The names of parameters outside of a module in the Transformers models that are around it."""
    inside = set(model.modules())
    return {
        parameter: f"{name}.{attribute}"
        for around in models_with([model], model)
        for name, module in around.named_modules()
        if module not in inside
        for attribute, parameter in module.named_parameters(recurse=False)
    }


def replacement_obstacle(layer: nn.Module) -> str | None:
    """Return why no layer can take the place of this one, as what would be lost of it; ``None`` if one can.

    Hooks of forward and backward passes, accelerate's hooks that move inputs, and plain attributes are not lost:
    :func:`swap_` carries them over.
    """
    if isinstance(layer, LinearPair):
        return _obstacle_in_pair(layer)
    weights = held_weights(layer)
    held = {id(tensor) for tensor in (*weights, getattr(layer, "bias", None))}
    if hasattr(layer, "parametrizations"):
        return "it is parametrized: call torch.nn.utils.parametrize.remove_parametrizations on it first"
    tensors = {**layer._parameters, **layer._buffers, **layer._modules}
    if more := [name for name, value in tensors.items() if value is not None and id(value) not in held]:
        return f"it holds {', '.join(more)} besides its weight"
    if found := [name for name in _HOOKS_OF_STATE if getattr(layer, name)]:
        return f"it has {found[0].removeprefix('_').replace('_', ' ')}, which know its parameters: remove them first"
    if any(weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None) for weight in weights):
        return "its weight has hooks for its gradient: remove them first, and register them on the new parameters"
    flags = (bool, int, float, str, type(None))
    if kept := [name for weight in weights for name, value in vars(weight).items() if not isinstance(value, flags)]:
        return f"its weight has the attribute {kept[0]}, which is nothing that can be copied to factors"
    if layer._compiled_call_impl is not None:
        return "it was compiled by itself: compile the model afterwards"
    cls = type(layer)
    methods = {name: value for name, value in vars(layer).items() if callable(getattr(cls, name, None))}
    if hasattr(layer, "_hf_hook"):  # accelerate has a way to move its hook
        methods["forward"] = layer._old_forward
    replaced = [name for name, value in methods.items() if getattr(value, "__func__", None) is not getattr(cls, name)]
    return f"its {replaced[0]} was replaced on this one layer" if replaced else None


def _obstacle_in_pair(pair: LinearPair) -> str | None:
    """Return why no layer can take the place of two linear ones, ``None`` if one can."""
    for half in pair:
        if type(half) is not nn.Linear:
            return f"one of its two layers is a {type(half).__name__}: merge an adapter first (merge_and_unload)"
        hooks = [name for name in _CARRIED_HOOKS if isinstance(getattr(half, name), dict) and getattr(half, name)]
        reason = f"it has {hooks[0].strip('_').replace('_', ' ')}: remove them first" if hooks else None
        if reason := reason or weight_obstacle(half.weight) or replacement_obstacle(half):
            return f"of one of its two layers {reason}"
    return None


def _carry_over_(layer: nn.Module, new: nn.Module) -> None:
    """Give a new layer the hooks and the attributes of the one in whose place it is; its weights get those of one."""
    for weight in held_weights(new):
        vars(weight).update(vars(held_weights(layer)[0]))
    if isinstance(new, HeadProjection) and new.bias is not None:
        vars(new.bias).update(vars(layer.get_parameter("bias")))
    for name in _CARRIED_HOOKS:
        new.__dict__[name] = layer.__dict__[name]  # the same, so that the handles that remove hooks still do
    hook = getattr(layer, "_hf_hook", None)
    for name, value in vars(layer).items():
        if name not in _own_attributes() and name not in ("_hf_hook", "_old_forward", "forward"):
            setattr(new, name, value)
    if hook is not None:
        import accelerate.hooks  # here, for it takes long to import

        accelerate.hooks.add_hook_to_module(new, hook)


def held_weights(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return the factors of a layer, or its weight."""
    if isinstance(layer, LinearPair):
        return tuple(half.get_parameter("weight") for half in reversed(layer))
    return layer.factors() if isinstance(layer, Factorized) else (layer.get_parameter("weight"),)


@functools.cache
def _own_attributes() -> frozenset[str]:
    """The attributes that layers have by themselves."""
    with torch.device("meta"):
        dense = (nn.Linear(1, 1), Conv1D(1, 1), nn.Embedding(1, 1), nn.Conv2d(1, 1, 1))
        factorized = (FactorizedLinear(1, 1, 1), FactorizedEmbedding(1, 1, 1), FactorizedConv2d(2, 2, 1, 1))
        heads = HeadProjection.empty_like(dense[0], [(1, 1)], width=1, is_output=False)
        others = (heads, TensorizedConv2d(2, 2, 1, 1), LinearPair(1, 1, 1))
        layers: tuple[nn.Module, ...] = (*dense, *factorized, *others)
    return frozenset(name for layer in layers for name in vars(layer))


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate holds a layer's parameters elsewhere, and brings them when the layer is called."""
    return hasattr(layer, "_hf_hook") and any(parameter.is_meta for parameter in layer.parameters(recurse=False))


def check_present(model: nn.Module, action: str) -> None:
    """Raise a ``ValueError`` if this process does not hold all of a model, which ``action`` needs."""
    for name, module in model.named_modules():
        if is_offloaded(module):
            raise ValueError(f"{action} needs the parameters of {name or type(model).__name__}, which {_OFFLOADED}")
    if any(is_partitioned(parameter) or isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            f"{action} needs whole parameters, but those of this {type(model).__name__} are divided among processes: "
            "do it in one process first (`hf-fnl factorize`, `hf-fnl merge`), then load what it wrote"
        )


def check_not_quantized(model: nn.Module) -> None:
    """Raise a ``ValueError`` if the configuration of a Transformers model says that it is quantized."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            other = quantization_of(getattr(module.config, "quantization_config", None))
            if other is not None:
                raise ValueError(
                    f"{type(module).__name__} is quantized with {method_of(other)}: factorize it before it is "
                    "quantized, or call its dequantize() first, which Transformers has for some methods (load a "
                    "GGUF file with quantization_config=GgufConfig(dequantize=True) instead)"
                )


def weight_obstacle(weight: Tensor) -> str | None:
    """Return why a weight is no matrix of numbers that can be factorized; ``None`` if it is one."""
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}"
    if weight.numel() == 0:
        return "its weight is empty"
    if not weight.is_floating_point():
        return "its weight is not of floating point"
    if weight.itemsize < 2:
        return f"its weight is of {weight.dtype}"
    return None


def is_read_by_its_parent(layer: nn.Module) -> bool:
    """Whether torch's attention reads a layer's weight without calling the layer."""
    return isinstance(layer, NonDynamicallyQuantizableLinear)
