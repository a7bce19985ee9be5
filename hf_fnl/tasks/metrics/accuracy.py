"""Loss, top-1 and top-5 accuracy of a classifier over all images of an evaluation, reduced on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_fnl.tasks.metrics.tokens import rows_of

TOP = 5  # of ImageNet's contest
MORE_THAN = 10  # classes; with fewer, five guesses say little


def image_sums(logits: Any, labels: Tensor) -> Tensor:
    """Return the cross-entropy and the hits of each image, so that an evaluation never keeps logits.

    A Trainer calls it as ``preprocess_logits_for_metrics``.

    Args:
        logits: Class logits ``(batch, num_classes)``, alone or followed by other outputs.
        labels: Class numbers ``(batch,)``.

    Returns:
        ``(batch, 2)``, or ``(batch, 3)`` with more than 10 classes: the cross-entropy in nats, then 1 where the label
        is the first, or among the first five, else 0.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    counts = (1, TOP) if logits.shape[-1] > MORE_THAN else (1,)
    found = logits.topk(counts[-1]).indices == labels[:, None]
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    return torch.stack([loss, *(found[:, :count].any(-1).float() for count in counts)], dim=1)


def image_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return means over all images: ``accuracy``, with more than 10 classes ``top5_accuracy``, and ``loss``.

    ``loss`` takes the place of the Trainer's own, a mean of the means of batches of whatever size.
    """
    means = rows_of(prediction).mean(0)
    return dict(zip(("loss", "accuracy", f"top{TOP}_accuracy"), map(float, means), strict=False))
