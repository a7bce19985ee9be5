"""Models and data that a command is given, checked before work starts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_fnl.models
from hf_fnl.cli.terminal import Terminal
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.checkpoint import load
from hf_fnl.training.tasks.documents import load_documents, looks_like_path
from hf_fnl.training.tasks.tokenization import load_tokenizer


def factorized_classes() -> dict[type[PreTrainedModel], type[FactorizedPreTrainedModel]]:
    """Our classes, by the stock classes that they are made from."""
    found = [cls for cls in vars(hf_fnl.models).values() if isinstance(cls, type)]
    return {cls.dense_class: cls for cls in found if issubclass(cls, FactorizedPreTrainedModel)}


def load_model(source: str, terminal: Terminal) -> PreTrainedModel:
    """Load the model that a folder or Hub id holds, of the class it was saved from; weights from safetensors only.

    Raises:
        OSError: If a file is missing, truncated or corrupt.
        ValueError: If the configuration names no known class, or the weights do not fit it.
    """
    if looks_like_path(source) and not Path(source).expanduser().is_dir():
        raise FileNotFoundError(f"no such folder: {source}")
    model, info = load(source, use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        terminal.note(f"note: {source} does not hold {', '.join(missing[:3])}{more}, drawn at random here")
    return model


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Text to calibrate with.

    Args:
        source: File, folder or Hub id; see :func:`~hf_fnl.training.tasks.documents.load_documents`.
        column: Column that holds the text.
        samples: Texts that are taken, the first ones.
        length: Tokens that are taken of each, at most as many as the model reads.
    """

    source: str
    column: str
    samples: int
    length: int


def calibration_batch(model: PreTrainedModel, tokenizer_source: str, texts: Texts) -> dict[str, Tensor]:
    """One batch of text for a model, with a mask.

    Raises:
        FileNotFoundError: If the file or the tokenizer is missing.
        ValueError: If the model reads no text, or there is none.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(f"--calibrate needs a model of text; a {type(model).__name__} reads {model.main_input_name}")
    tokenizer = load_tokenizer(tokenizer_source)
    length = min(tokenizer.model_max_length, _longest(model, texts.length))
    rows = load_documents(texts.source, text_column=texts.column, streaming=True)
    found = list(itertools.islice((row["text"] for row in rows if (row["text"] or "").strip()), texts.samples))
    if not found:
        raise ValueError(f"no text in {texts.source}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(found, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return text_inputs(model, batch["input_ids"], attention_mask=batch["attention_mask"])


def random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs that a model can run on, the same at every call.

    Raises:
        ValueError: If it reads neither text nor images.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "input_ids":
        ids = torch.randint(config.get_text_config().vocab_size, (2, _longest(model, 16)), generator=generator)
        return text_inputs(model, ids)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)  # a network of convolutions takes any
        height, width = size if isinstance(size, list | tuple) else (size, size)
        images = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": images.to(model.dtype)}
    raise ValueError(f"cannot make up the {model.main_input_name} of a {type(model).__name__}; --no-check skips this")


def text_inputs(model: PreTrainedModel, ids: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """What a model is called with to read a text; one with an encoder and a decoder reads it on both sides."""
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **both, **more}


def _longest(model: PreTrainedModel, length: int) -> int:
    """This length, or the longest that the model has positions for; None and -1 mean that any is."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(length, positions) if positions is not None and positions > 0 else length
