"""Loss, perplexity and accuracy over all tokens of an evaluation, reduced on the device.

``*_sums`` is a Trainer's ``preprocess_logits_for_metrics``: it reduces the logits of a batch to sums of each sequence,
so that an evaluation never keeps vocabulary logits. ``*_metrics`` is its ``compute_metrics``, of the sums of all
sequences, whatever batches and processes they came in. Its ``loss`` takes the place of the Trainer's own, a mean of the
batches' means, in which a last batch of one sequence counts as much as a full one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX


def token_sums(logits: Any, labels: Tensor) -> Tensor:
    """Return for each sequence the summed cross-entropy, the number of labels, and of those predicted right.

    Args:
        logits: Vocabulary logits ``(batch, length, vocab_size)``, alone or followed by other outputs.
        labels: ``(batch, length)``, -100 where nothing is predicted.

    Returns:
        ``(batch, 3)``, in nats and tokens.
    """
    sums = []
    # One sequence at a time: float32 logits of a batch would be a second copy of them.
    for row, targets in zip(logits[0] if isinstance(logits, tuple | list) else logits, labels, strict=True):
        labelled = targets != IGNORE_INDEX
        row, targets = row[labelled].float(), targets[labelled]
        loss = F.cross_entropy(row, targets, reduction="sum")
        sums.append(torch.stack([loss, labelled.sum().float(), (row.argmax(-1) == targets).sum().float()]))
    return torch.stack(sums)


def causal_sums(logits: Any, labels: Tensor) -> Tensor:
    """Return :func:`token_sums` of a causal language model, whose logits are one token ahead of the labels."""
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return token_sums(logits[:, :-1], labels[:, 1:])


def masked_sums(logits: Any, labels: Any) -> Tensor:
    """Return :func:`token_sums`, and the next sentence's cross-entropy and whether it was right, NaN without labels.

    Args:
        logits: Vocabulary logits ``(batch, length, vocab_size)``, alone or followed by next-sentence logits.
        labels: Labels ``(batch, length)``, alone or followed by next-sentence labels.

    Returns:
        ``(batch, 5)``.
    """
    is_pair = isinstance(logits, tuple | list)
    sums = token_sums(logits, labels[0] if is_pair else labels)
    if not is_pair:
        return torch.cat([sums, torch.full_like(sums[:, :2], math.nan)], dim=1)
    loss = F.cross_entropy(logits[1].float(), labels[1], reduction="none")
    right = (logits[1].argmax(-1) == labels[1]).float()
    return torch.cat([sums, torch.stack([loss, right], dim=1)], dim=1)


def rows_of(prediction: EvalPrediction) -> NDArray[np.float64]:
    """Return the sums of all sequences, a row each, also of batches that a Trainer was told not to concatenate."""
    found = prediction.predictions
    return np.concatenate(found if isinstance(found, list) else [found]).astype(np.float64)


def token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return loss, perplexity and accuracy per token."""
    loss, tokens, right = rows_of(prediction).sum(axis=0)
    tokens = max(tokens, 1)
    return {"loss": loss / tokens, "perplexity": perplexity(loss / tokens), "token_accuracy": right / tokens}


def masked_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return loss, accuracy and perplexity per labelled position, next-sentence accuracy, and the sum of the losses."""
    figures = rows_of(prediction)
    loss, labelled, right = figures[:, :3].sum(axis=0)
    labelled = max(labelled, 1)
    metrics = {
        "mlm_loss": loss / labelled,
        "mlm_accuracy": right / labelled,
        "mlm_perplexity": perplexity(loss / labelled),
    }
    metrics["loss"] = metrics["mlm_loss"]
    if not np.isnan(figures[:, 3]).all():
        metrics["loss"] += figures[:, 3].mean()
        metrics["next_sentence_accuracy"] = figures[:, 4].mean()
    return {name: float(value) for name, value in metrics.items()}


def causal_metrics(prediction: EvalPrediction, *, num_words: int) -> dict[str, float]:
    r"""Return perplexities per token and per word of a text, ``exp(N / tokens)`` and ``exp(N / words)``.

    ``N`` is the summed cross-entropy of all tokens, in nats.

    Args:
        prediction: What :func:`causal_sums` made of all sequences.
        num_words: Words of the text that white space separates. The end-of-text token after each document adds to
            ``N`` and to the tokens, not to the words; WikiText's own counts have one more word for each line.

    Returns:
        ``loss``, in nats per token, ``perplexity_per_token``, ``perplexity_per_word``, ``nats_per_token``, ``tokens``
        and ``words``.
    """
    nats, tokens = rows_of(prediction).sum(0)[:2]
    return {
        "loss": float(nats / max(tokens, 1)),
        "perplexity_per_token": perplexity(nats / max(tokens, 1)),
        "perplexity_per_word": perplexity(nats / max(num_words, 1)),
        "nats_per_token": float(nats / max(tokens, 1)),
        "tokens": int(tokens),
        "words": num_words,
    }


def perplexity(loss: float) -> float:
    """Return ``exp(loss)``, and the largest there is where that would overflow."""
    return math.exp(min(loss, 700))
