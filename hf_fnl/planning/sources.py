"""Models by name or configuration: without values, on the ``meta`` device, or with values that are drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_fnl.models
from hf_fnl.models import (
    FactorizedBertConfig,
    FactorizedBertForPreTraining,
    FactorizedGPT2Config,
    FactorizedGPT2LMHeadModel,
    FactorizedMarianConfig,
    FactorizedMarianMTModel,
)
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.checkpoint import read_config, saved_class
from hf_fnl.utils.folders import check_model

_BERT: tuple[Any, Any] = (FactorizedBertForPreTraining, FactorizedBertConfig)
_GPT2: tuple[Any, Any] = (FactorizedGPT2LMHeadModel, FactorizedGPT2Config)
_MARIAN: tuple[Any, Any] = (FactorizedMarianMTModel, FactorizedMarianConfig)

# Sizes that the configurations of these models on the Hub have; what is not named is the default of their family.
PRESETS: dict[str, tuple[tuple[Any, Any], dict[str, int]]] = {
    "bert-base": (_BERT, {}),
    "bert-large": (
        _BERT,
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2": (_GPT2, {}),
    "gpt2-medium": (_GPT2, {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": (_GPT2, {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": (_GPT2, {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "marian": (
        _MARIAN,
        {
            "vocab_size": 58101,
            "d_model": 512,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
        },
    ),
}


def meta_model(source: str, **ranks: int | None) -> PreTrainedModel:
    """Build a model on ``meta``; no weight is downloaded or read.

    Args:
        source: A name in :data:`PRESETS`, a model's folder, its ``config.json``, or an id on the Hub, ``USER/MODEL``.
        **ranks: Ranks as our configurations take them; ``None`` leaves what the configuration says.

    Raises:
        FileNotFoundError: If ``source`` is none of these.
        ValueError: If the configuration names no known class, or the class cannot take the ranks.
    """
    with torch.device("meta"):
        return fresh_model(source, **ranks)


def fresh_model(source: str, **ranks: int | None) -> PreTrainedModel:
    """Build a model as :func:`meta_model` does, with values that are drawn."""
    given = {name: rank for name, rank in ranks.items() if rank is not None}
    if source in PRESETS:
        (model_class, config_class), sizes = PRESETS[source]
        model_class, config = model_class, config_class(**sizes)
    else:
        model_class, config = _of_file(source)
    if given:
        model_class, config = _with_ranks(model_class, config, given)
    return model_class(config)


def _of_file(source: str) -> tuple[Any, Any]:
    path = Path(source).expanduser()
    if not path.is_file():
        try:
            check_model(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; by name there are {', '.join(PRESETS)}") from error
    config = read_config(path if path.exists() else source, local_files_only=path.exists())
    return saved_class(source, config), config


def _with_ranks(model_class: Any, config: Any, ranks: dict[str, int]) -> tuple[Any, Any]:
    """The factorized class of a model and its configuration with these ranks."""
    ours = [cls for cls in vars(hf_fnl.models).values() if _is_ours(cls)]
    found = [cls for cls in ours if model_class in (cls, cls.dense_class)]
    if not found:
        raise ValueError(f"{', '.join(ranks)}: {model_class.__name__} has no factorized class; leave the ranks out")
    config_class = found[0].config_class
    if unknown := ranks.keys() - set(config_class.rank_options()):
        raise ValueError(f"{config_class.__name__} has no {', '.join(sorted(unknown))}")
    return found[0], config_class.from_dense(config, **ranks)


def _is_ours(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, FactorizedPreTrainedModel) and hasattr(cls, "dense_class")
