"""Made-up examples, for models whose speed is looked at and not their loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

LABELLED = 0.15  # share of the positions that a masked language model predicts (Devlin et al. 2019)


def random_examples(model: PreTrainedModel, count: int, length: int) -> list[dict[str, Tensor]]:
    """Examples that a model computes a loss of, the same at every call.

    Args:
        model: For pretraining, language modelling (masked, causal), translation, or classification of images or texts.
        count: How many.
        length: Tokens of a text; on both sides, if there are two.

    Raises:
        ValueError: If the model is none of these, or has fewer positions.
    """
    taken = inspect.signature(model.forward).parameters
    if "labels" not in taken:
        raise ValueError(f"a {type(model).__name__} computes no loss; name a model with a head, as for pretraining")
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return [_image(model.config, generator) for _ in range(count)]
    if model.main_input_name != "input_ids":
        raise ValueError(f"cannot make up the {model.main_input_name} of a {type(model).__name__}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"sequence_length must be at most {positions} for this model, got {length}")
    return [_text(model, taken, length, generator) for _ in range(count)]


def _image(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    size = getattr(config, "image_size", None) or 224  # a network of convolutions takes any
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.randn(getattr(config, "num_channels", 3), height, width, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(config.num_labels, (), generator=generator)}


def _text(model: PreTrainedModel, taken: Any, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(model.config.get_text_config().vocab_size, (length,), generator=generator)
    if model.config.is_encoder_decoder or model.can_generate():
        return {"input_ids": ids, "labels": ids}
    if model.get_output_embeddings() is None:
        return {"input_ids": ids, "labels": torch.randint(model.config.num_labels, (), generator=generator)}
    labels = torch.full_like(ids, -100)
    chosen = torch.randperm(length, generator=generator)[: max(1, round(LABELLED * length))]
    labels[chosen] = ids[chosen]
    example = {"input_ids": ids, "labels": labels}
    if "next_sentence_label" in taken:
        example["next_sentence_label"] = torch.randint(2, (), generator=generator)
    return example
