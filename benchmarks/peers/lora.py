"""Adapters of PEFT, of as many parameters as are trained in something else."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import PreTrainedModel


def with_lora(model: PreTrainedModel, trained: int) -> PreTrainedModel:
    """Give every linear layer of BERT's encoder an adapter, of the rank that makes ``trained`` parameters of all.

    Args:
        model: A BERT with a head; the adapters are put into it, everything but them and the head is frozen.
        trained: Parameters.

    Raises:
        ImportError: If PEFT is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("peft is not installed") from error
    encoder = model.base_model.encoder
    layers = {name: layer for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)}
    rank = max(1, round(trained / sum(layer.in_features + layer.out_features for layer in layers.values())))
    names = sorted({name.split(".", 2)[2] for name in layers})  # without the number of the layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), encoder)
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model
