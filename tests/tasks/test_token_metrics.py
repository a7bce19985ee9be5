"""Metrics reduced on the device against the same figures from all logits."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from hf_fnl.tasks.metrics.tokens import causal_metrics, masked_metrics, masked_sums, token_metrics, token_sums


@pytest.mark.parametrize("pairs", [True, False], ids=["with next sentence", "mlm alone"])
def test_reduced_batches_give_the_figures_of_all_logits(pairs):
    logits, labels = torch.randn(6, 7, 11), torch.randint(0, 11, (6, 7))
    labels[torch.rand(6, 7) < 0.7] = -100
    relationship, next_sentence = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    reduced = [
        masked_sums((logits[rows], relationship[rows]), (labels[rows], next_sentence[rows]))
        if pairs
        else masked_sums(logits[rows], labels[rows])
        for rows in (slice(0, 2), slice(2, 6))
    ]
    metrics = masked_metrics(EvalPrediction(np.concatenate(reduced), None))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item()
    labelled = labels != -100
    accuracy = (logits.argmax(-1) == labels)[labelled].float().mean().item()
    assert metrics["mlm_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["mlm_perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    assert metrics["mlm_accuracy"] == pytest.approx(accuracy, rel=1e-5)
    expected = (relationship.argmax(-1) == next_sentence).float().mean().item()
    assert metrics.get("next_sentence_accuracy") == (pytest.approx(expected) if pairs else None)
    total = loss + F.cross_entropy(relationship, next_sentence).item() if pairs else loss
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("metrics", [token_metrics, masked_metrics, functools.partial(causal_metrics, num_words=9)])
def test_batches_that_are_not_concatenated_give_the_same(metrics):
    sums = np.random.default_rng(0).random((5, 5 if metrics is masked_metrics else 3))
    whole, batches = (metrics(EvalPrediction(rows, None)) for rows in (sums, [sums[:3], sums[3:]]))
    assert batches == pytest.approx(whole)


def test_nothing_labelled_is_no_division_by_zero():
    reduced = masked_sums(torch.randn(2, 3, 5), torch.full((2, 3), -100))
    assert masked_metrics(EvalPrediction(reduced.numpy(), None))["mlm_loss"] == 0


def test_sums_of_sentences_give_metrics_of_all_tokens():
    logits, labels = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    labels[0, 3:] = labels[2, 1:] = -100
    labels[1] = logits[1].argmax(-1)
    sums = token_sums((logits, torch.zeros(3, 2, 4)), labels)
    assert sums[:, 1].tolist() == [3, 5, 1]
    assert sums[1, 2] == 5
    metrics = token_metrics(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
