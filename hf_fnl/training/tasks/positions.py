"""How long the sequences are that a model reads."""

from __future__ import annotations

import math

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Names of the modules that hold a vector for each position.
_NAMES = ("position_embeddings", "embed_positions", "wpe")


def longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | float:
    """Return the most tokens that a model has positions for; infinity where it has no vector for each.

    A model whose positions count from behind its padding index, as RoBERTa's do, reads as many fewer.

    Args:
        model: Any model of Transformers.
        tokenizer: Its tokenizer, which may know of a lower bound.
    """
    bounds = [tokenizer.model_max_length, math.inf]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _NAMES:
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            stated = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
            bounds.append(min(module.num_embeddings - offset, stated))
    return min(bounds)


def check_length(option: str, length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse sequences for which a model has no positions.

    Args:
        option: That sets the length.
        length: Tokens of the longest sequence.
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        ValueError: If they are longer than :func:`longest_sequence`.
    """
    if length > (longest := longest_sequence(model, tokenizer)):
        raise ValueError(
            f"{option} must be at most {longest}, the positions of this {type(model).__name__}, got {length}"
        )
