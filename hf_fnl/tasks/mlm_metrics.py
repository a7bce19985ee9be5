"""Metrics of masked language modelling and next-sentence prediction, reduced on the device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX


def reduce_logits(logits: Any, labels: Any) -> Tensor:
    """Reduce the logits of a batch to sums, so that an evaluation never keeps vocabulary logits.

    A Trainer calls it as ``preprocess_logits_for_metrics``.

    Args:
        logits: Vocabulary logits ``(batch, length, vocab_size)``, alone or followed by next-sentence logits.
        labels: Labels ``(batch, length)``, alone or followed by next-sentence labels.

    Returns:
        ``(batch, 4)``: per sequence the summed cross-entropy, the number of labelled positions, the number predicted
        right, and whether the next sentence was (NaN without next-sentence labels).
    """
    is_pair = isinstance(logits, (tuple, list))
    vocabulary_logits, mlm_labels = (logits[0], labels[0]) if is_pair else (logits, labels)
    labelled = mlm_labels != IGNORE_INDEX
    chosen, targets = vocabulary_logits[labelled].float(), mlm_labels[labelled]
    losses = torch.zeros(mlm_labels.shape, device=chosen.device)
    losses[labelled] = F.cross_entropy(chosen, targets, reduction="none")
    right = torch.zeros_like(losses)
    right[labelled] = (chosen.argmax(-1) == targets).float()
    sums = [losses.sum(-1), labelled.sum(-1).float(), right.sum(-1)]
    sums.append((logits[1].argmax(-1) == labels[1]).float() if is_pair else torch.full_like(sums[0], math.nan))
    return torch.stack(sums, dim=1)


def mlm_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, accuracy and perplexity per labelled position, and next-sentence accuracy, over all sequences."""
    loss, labelled, right, next_sentence = np.asarray(prediction.predictions, dtype=np.float64).T
    mlm_loss = loss.sum() / max(labelled.sum(), 1)
    metrics = {
        "mlm_loss": float(mlm_loss),
        "mlm_accuracy": float(right.sum() / max(labelled.sum(), 1)),
        "mlm_perplexity": math.exp(min(mlm_loss, 700)),
    }
    if not np.isnan(next_sentence).all():
        metrics["next_sentence_accuracy"] = float(next_sentence.mean())
    return metrics
