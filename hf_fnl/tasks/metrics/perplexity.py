"""Perplexity per token and per word of a whole text."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX


def sum_losses(logits: Any, labels: Tensor) -> Tensor:
    """Reduce the logits of a batch to sums, so that an evaluation never keeps vocabulary logits.

    A Trainer calls it as ``preprocess_logits_for_metrics``.

    Args:
        logits: Vocabulary logits ``(batch, length, vocab_size)``, alone or followed by other outputs.
        labels: Labels ``(batch, length)``, not shifted; -100 where nothing is predicted.

    Returns:
        ``(batch, 2)``: per sequence the summed cross-entropy, in nats, and the number of tokens predicted.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    # One sequence at a time: float32 logits of a batch would be a second copy of them.
    losses = [F.cross_entropy(row[:-1].float(), t, reduction="sum") for row, t in zip(logits, targets, strict=True)]
    return torch.stack([torch.stack(losses), (targets != IGNORE_INDEX).sum(-1).float()], dim=1)


def perplexities(prediction: EvalPrediction, *, num_words: int) -> dict[str, float]:
    r"""Perplexities from the sums of all sequences, whatever batches and processes they came in.

    ``exp(N / tokens)`` and ``exp(N / words)`` with ``N`` the summed cross-entropy of all tokens. The Trainer's
    ``eval_loss`` is a mean over batches, so other than ``ln`` of the first where they hold different numbers of tokens.

    Args:
        prediction: What :func:`sum_losses` made of all sequences.
        num_words: Words of the text that white space separates. The end-of-text token after each document adds to
            ``N`` and to the tokens, not to the words; WikiText's own counts have one more word for each line.

    Returns:
        ``perplexity_per_token``, ``perplexity_per_word``, ``nats_per_token``, ``tokens`` and ``words``.
    """
    nats, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
    return {
        "perplexity_per_token": _exp(nats / max(tokens, 1)),
        "perplexity_per_word": _exp(nats / max(num_words, 1)),
        "nats_per_token": float(nats / max(tokens, 1)),
        "tokens": int(tokens),
        "words": num_words,
    }


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700))  # the largest float64 is about exp(709)
