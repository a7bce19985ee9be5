"""Top-1 and top-5 accuracy of a classifier, reduced on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

TOP = 5  # of ImageNet's contest
MORE_THAN = 10  # classes; with fewer, five guesses say little


def topk_hits(logits: Any, labels: Tensor) -> Tensor:
    """Reduce the logits of a batch to hits, so that an evaluation never keeps logits.

    A Trainer calls it as ``preprocess_logits_for_metrics``.

    Args:
        logits: Class logits ``(batch, num_classes)``, alone or followed by other outputs.
        labels: Class numbers ``(batch,)``.

    Returns:
        ``(batch, 1)``, or ``(batch, 2)`` with more than 10 classes: 1 where the label is the first, or among the first
        five, else 0.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    counts = (1, TOP) if logits.shape[-1] > MORE_THAN else (1,)
    found = logits.topk(counts[-1]).indices == labels[:, None]
    return torch.stack([found[:, :count].any(-1) for count in counts], dim=1).float()


def image_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return ``accuracy`` and, with more than 10 classes, ``top5_accuracy``, from the hits of all images."""
    means = np.asarray(prediction.predictions, dtype=np.float64).mean(0)
    return dict(zip(("accuracy", f"top{TOP}_accuracy"), map(float, means), strict=False))
