"""Losses of factorized BERT: sparse prediction equals dense, and parts of a batch add up to the whole."""

from typing import Any

import pytest
import torch
from bert_cases import (
    BATCH,
    LENGTH,
    LOW,
    MASKED_LM,
    NO_DROPOUT,
    PRETRAINING,
    SIZES,
    masked_labels,
)
from family import Head, add, loss_and_gradients, run
from torch import Tensor
from torch.testing import assert_close

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LABELLED = 11  # in the batch of the cases
masked_heads = pytest.mark.parametrize("head", [PRETRAINING, MASKED_LM], ids=["pretraining", "masked-lm"])
embedding_ranks = pytest.mark.parametrize("rank", [None, 13], ids=["dense", "factorized"])


def logits_of(outputs: Any) -> Tensor:
    return outputs["logits"] if "logits" in outputs else outputs["prediction_logits"]


@masked_heads
@embedding_ranks
def test_sparse_prediction_equals_dense(head: Head, rank: int | None) -> None:
    ranks = {**LOW, "embedding_rank": rank}
    sparse, dense = (head.build(ranks, **NO_DROPOUT, sparse_prediction=on).train() for on in (True, False))
    assert_close(loss_and_gradients(sparse, head.batch()), loss_and_gradients(dense, head.batch()), **CLOSE)
    everywhere = logits_of(dense(**head.batch()))
    assert everywhere.shape == (BATCH, LENGTH, SIZES["vocab_size"])
    labelled = head.batch()["labels"] != -100
    assert_close(logits_of(sparse(**head.batch())), everywhere[labelled], **CLOSE)
    assert labelled.sum() == LABELLED


@masked_heads
def test_evaluation_and_prediction_without_labels_are_dense(head: Head) -> None:
    model, batch = head.build(LOW, **NO_DROPOUT), head.batch()
    expected = run(head.build(LOW, **NO_DROPOUT, sparse_prediction=False), batch)
    assert_close(run(model, batch), expected)
    del batch["labels"]
    assert logits_of(run(model.train(), batch)).shape == (BATCH, LENGTH, SIZES["vocab_size"])


@masked_heads
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_batch_without_labels_contributes_nothing(head: Head, sparse: bool) -> None:
    model = head.build(LOW, **NO_DROPOUT, sparse_prediction=sparse).train()
    batch = {**head.batch(), "labels": masked_labels(0, 0, 0, 0)}
    result = loss_and_gradients(model, batch)
    if head is PRETRAINING:
        expected = torch.nn.functional.cross_entropy(
            model(**batch).seq_relationship_logits, batch["next_sentence_label"]
        )
        assert_close(result["loss"], expected.detach())
    else:
        assert result["loss"] == 0
    assert all(torch.isfinite(value).all() for value in result.values())
    assert result["cls.predictions.bias"].abs().sum() == 0


def test_without_the_number_of_sequences_next_sentence_loss_weighs_as_the_labels_do() -> None:
    model, batch = PRETRAINING.build(LOW, **NO_DROPOUT).train(), PRETRAINING.batch()
    batch["labels"] = masked_labels(3, 3, 3, 3)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, None))]
    added = add([loss_and_gradients(model, part, num_items_in_batch=12) for part in parts])
    assert_close(added, loss_and_gradients(model, batch), **CLOSE)


@pytest.mark.parametrize("head", [PRETRAINING, MASKED_LM], ids=["pretraining", "masked-lm"])
def test_loss_of_half_precision_is_computed_in_float32(head: Head) -> None:
    model = head.build(LOW, **NO_DROPOUT).to(torch.bfloat16)
    assert model(**head.batch()).loss.dtype == torch.float32


@embedding_ranks
def test_logits_under_autocast_have_the_dtype_of_the_stock_model(rank: int | None) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run(MASKED_LM.build_stock(), MASKED_LM.batch())["logits"]
        logits = run(MASKED_LM.build({"embedding_rank": rank}), MASKED_LM.batch())["logits"]
    assert logits.dtype == expected.dtype == torch.bfloat16
