"""Registration of a family with Transformers' Auto classes."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel


def register(config_class: type[PreTrainedConfig], tokenizer_class: Any, **models: type[PreTrainedModel]) -> None:
    """Let the Auto classes know a family.

    Args:
        config_class: Its configuration.
        tokenizer_class: Its tokenizer, ``None`` for the one that a checkpoint names.
        **models: Its models, by the names of the Auto classes.
    """
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    if tokenizer_class is not None:
        AutoTokenizer.register(config_class, tokenizer_class=tokenizer_class, exist_ok=True)
    for name, model_class in models.items():
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)
