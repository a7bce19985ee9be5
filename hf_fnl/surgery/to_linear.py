"""Products of factors as pairs of plain linear layers, for what knows only these."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import torch
from torch import Tensor, nn

from hf_fnl.layers import Factorized, FactorizedLinear, LinearPair
from hf_fnl.surgery.record import models_with
from hf_fnl.surgery.swap import check_present, replacement_obstacle, swap_and_record_, unwrapped
from hf_fnl.surgery.targets import Replacements

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def to_linear_(model: Model) -> Model:
    """Make two plain linear layers of every factorized linear layer, one after the other, in place.

    What works on ``torch.nn.Linear`` then works on both: quantization, adapters, exports. The outputs are the same to
    rounding, and so are the number of parameters and operations; a middle factor (``deep``) is multiplied into the
    first. A Transformers model saves and loads as before, wherever ``hf_fnl`` is imported, and
    :func:`~hf_fnl.surgery.merge_` makes the pairs dense. Training is better done before: no decay and no diagnostics
    know that the two are a product.

    Layers that share their factors with others, as an output matrix that is tied to an embedding, stay as they are, and
    so do factorized embeddings and convolutions; narrow heads are plain layers already.

    Args:
        model: A model that holds factorized linear layers.

    Returns:
        The same model.

    Raises:
        ValueError: If there is no such layer, the model is offloaded or divided among processes, or something would be
            lost with a factorized layer.
    """
    inner = unwrapped(model)
    layers = layers_with_own_factors(inner)
    if not layers or "" in layers:
        remedy = "; use LinearPair.from_factorized" if layers else ""
        raise ValueError(f"{type(inner).__name__} holds no factorized linear layer with factors of its own{remedy}")
    check_present(inner, "to_linear_")
    for name, layer in layers.items():
        if (reason := replacement_obstacle(layer)) is not None:
            raise ValueError(f"{name} cannot become linear layers: {reason}")
    pairs: Replacements = {layer: LinearPair.from_factorized(layer) for layer in layers.values()}
    swap_and_record_(inner, pairs)
    return model


def layers_with_own_factors(model: nn.Module) -> dict[str, FactorizedLinear]:
    """Return the factorized linear layers of a model, by name, whose factors no other layer has, nor one around it."""
    around = models_with([model], model)
    holders = {module for each in (model, *around) for module in each.modules() if isinstance(module, Factorized)}
    shared = Counter(factor for layer in holders for factor in _parameters(layer))
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, FactorizedLinear) and all(shared[factor] == 1 for factor in _parameters(layer))
    }


def _parameters(layer: Factorized) -> list[Tensor]:
    return [parameter for name, parameter in layer.named_parameters(recurse=False) if name != "bias"]
