"""Models that a script is given: loaded for its task, and how long the sequences are that they read."""

from __future__ import annotations

import math
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_fnl.training.command_line import named
from hf_fnl.utils.hub import check_source
from hf_fnl.utils.processes import is_first

# Names of the modules that hold a vector for each position.
_NAMES = ("position_embeddings", "embed_positions", "wpe")


def load_pretrained(option: str, source: str, auto_class: Any, *, is_trained: bool) -> PreTrainedModel:
    """Load a model for a task.

    Args:
        option: That names it, for errors.
        source: Folder or Hub id.
        auto_class: Of Transformers, such as ``AutoModelForQuestionAnswering``.
        is_trained: Whether it must hold all weights of the task. If not, what it lacks is drawn, and said in a line.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is of no class for the task, or lacks weights that it must hold.
    """
    verbosity = logging.get_verbosity()
    with named(option, source):
        check_source(source)
        try:
            logging.set_verbosity_error()  # or there is a table of what is expected here
            model, found = auto_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
        except ValueError as error:
            if not str(error).startswith("Unrecognized configuration class"):
                raise
            config = str(error).partition("configuration class ")[2].partition("'>")[0].rpartition(".")[2]
            raise ValueError(f"a model of {config} is none that {auto_class.__name__} loads") from error
        finally:
            logging.set_verbosity(verbosity)
        missing = sorted({name.rpartition(".")[0] for name in found["missing_keys"]})
        if missing and is_trained:
            raise ValueError(f"it holds no weights of {', '.join(missing)}, so it was not trained for this task")
    if missing and is_first():
        print(f"note: {', '.join(missing)} is not in {source} and is drawn at random", file=sys.stderr)
    return model


def longest_sequence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | float:
    """Return the most tokens that a model has positions for; infinity where it has no vector for each.

    A model whose positions count from behind its padding index, as RoBERTa's do, reads as many fewer. The tokenizer may
    know of a lower bound.
    """
    bounds = [tokenizer.model_max_length, math.inf]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _NAMES:
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            stated = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
            bounds.append(min(module.num_embeddings - offset, stated))
    return min(bounds)


def check_length(option: str, length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ``ValueError`` if an option sets a length, in tokens, above :func:`longest_sequence`."""
    if length > (longest := longest_sequence(model, tokenizer)):
        raise ValueError(
            f"{option} must be at most {longest}, the positions of this {type(model).__name__}, got {length}"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ``ValueError`` if a tokenizer has more tokens than a model embeddings."""
    if len(tokenizer) > (entries := model.config.get_text_config().vocab_size):
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, and this {type(model).__name__} embeds {entries}: it was "
            "trained with another one"
        )
