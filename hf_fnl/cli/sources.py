"""Models that a command is given, and inputs to try them on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_fnl.models
import hf_fnl.vision.models  # registers them
from hf_fnl.cli.terminal import Terminal
from hf_fnl.cli.texts import longest_input, text_inputs
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.surgery_loading import load
from hf_fnl.utils.suggest import listed


def factorized_classes() -> dict[type[PreTrainedModel], type[FactorizedPreTrainedModel]]:
    """Return our classes, by the stock classes that they are made from, which hold all products of their heads.

    Where queries and keys are none, as in Llama, surgery on each layer reaches more.
    """
    found = [cls for cls in vars(hf_fnl.models).values() if isinstance(cls, type)]
    ours = (cls for cls in found if issubclass(cls, FactorizedPreTrainedModel))
    return {cls.dense_class: cls for cls in ours if "qk_rank" in cls.config_class.rank_options()}


def load_model(source: str, terminal: Terminal) -> PreTrainedModel:
    """Load the model that a folder or Hub id holds, of the class it was saved from; weights from safetensors only.

    Raises:
        OSError: If a file is missing, truncated or corrupt.
        ValueError: If the configuration names no known class, or the weights do not fit it.
    """
    model, info = load(source, use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        terminal.note(f"note: {source} does not hold {listed(missing, 3)}, drawn at random here")
    return model


def load_to_convert(source: str, terminal: Terminal) -> PreTrainedModel:
    """Load as :func:`load_model` does; one with an adapter, which would save that alone, is a ``ValueError``."""
    model = load_model(source, terminal)
    if getattr(model, "peft_config", None):
        raise ValueError(f"{source} holds an adapter of PEFT beside the model: merge it in Python (merge_and_unload)")
    return model


def random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs that a model can run on, the same at every call.

    Raises:
        ValueError: If it reads neither text nor images.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.randint(config.get_text_config().vocab_size, (2, longest_input(model, 16)), generator=generator)
        return text_inputs(model, ids)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)  # a network of convolutions takes any
        height, width = size if isinstance(size, list | tuple) else (size, size)
        images = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": images.to(model.dtype)}
    raise ValueError(f"cannot make up the {model.main_input_name} of a {type(model).__name__}; --no-check skips this")
