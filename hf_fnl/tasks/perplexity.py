"""Perplexity of a causal language model on a text: windows with a stride, per token and per word."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_fnl.tasks.metrics.tokens import perplexity

_CHARACTERS = 8  # of a token, at most: as much of a text holds its first tokens


@dataclass(frozen=True)
class Perplexity:
    """What a text costs a model.

    Args:
        nll: Sum of the negative log-likelihoods of its tokens, in nats.
        tokens: How many were predicted: all but the first.
        words: How many words they are, as white space divides them.
    """

    nll: float
    tokens: int
    words: int

    @property
    def per_token(self) -> float:
        """``exp(nll / tokens)``, which depends on the tokenizer."""
        return perplexity(self.nll / self.tokens)

    @property
    def per_word(self) -> float:
        """``exp(nll / words)``, by which models of different tokenizers are compared."""
        return perplexity(self.nll / self.words)


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> tuple[Tensor, int]:
    """Return the ids ``(count,)`` of the first tokens of a text, fewer of a shorter one, and the number of words."""
    text = text[: count * _CHARACTERS]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(encoded["input_ids"][:count])
    end = encoded["offset_mapping"][len(ids) - 1][1] if len(ids) else 0
    return ids, len(text[: end or None].split())


@torch.inference_mode()
def text_perplexity(
    model: PreTrainedModel, ids: Tensor, words: int, *, length: int = 1024, stride: int = 512
) -> Perplexity:
    """Measure how well a causal language model predicts a text.

    A window of ``length`` tokens moves on by ``stride``; of each window those tokens count that no window before it
    held, so each but the first is predicted once, from ``length - stride`` or more tokens, as far as there are.

    Args:
        model: Gives ``logits``; it is called as it is, so put it into evaluation mode first.
        ids: Token ids ``(count,)`` of the text.
        words: Words of the text.
        length: Tokens of a window.
        stride: By how many it moves on.

    Raises:
        ValueError: If there are fewer than two tokens or no word, or not ``1 <= stride < length``.
    """
    if ids.numel() < 2 or words < 1:
        raise ValueError(f"perplexity needs a text of at least 2 tokens and a word, got {ids.numel()} and {words}")
    if not 1 <= stride < length:
        raise ValueError(f"stride must be at least 1 and below the length of a window, {length}, got {stride}")
    nll, done = 0.0, 1
    for start in range(0, ids.numel(), stride):
        window = ids[start : start + length].to(model.device)
        fresh = start + len(window) - done
        logits = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0, -fresh - 1 : -1]
        nll += nn.functional.cross_entropy(logits.float(), window[-fresh:], reduction="sum").item()
        done += fresh
        if done == ids.numel():
            break
    return Perplexity(nll, ids.numel() - 1, words)
