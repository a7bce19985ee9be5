"""The loss of factorized GPT-2 without logits equals that with them, and parts of a batch add up to the whole."""

from typing import Any

import pytest
import torch
from family import Head, loss_and_gradients, run
from gpt2_cases import BATCH, CROSS_LM, FULL, FULL_QKV, LENGTH, LM, LOW, LOW_QKV, NO_DROPOUT, SIZES
from torch.testing import assert_close

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}
WHOLE = (BATCH, LENGTH, SIZES["vocab_size"])
RANKS = {"factorized-vocabulary": LOW, "dense-vocabulary": LOW_QKV}
each_vocabulary = pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
each_head = pytest.mark.parametrize("head", [LM, CROSS_LM], ids=["lm", "cross-lm"])


@each_head
@each_vocabulary
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_loss_and_its_gradients_need_no_logits(head: Head, ranks: dict[str, int], tied: bool) -> None:
    model = head.build(ranks, **NO_DROPOUT, tie_word_embeddings=tied).train()
    fused = loss_and_gradients(model, head.batch())
    model.config.fused_loss = False
    assert_close(fused, loss_and_gradients(model, head.batch()), **CLOSE)


@pytest.mark.parametrize("ranks", [FULL, FULL_QKV], ids=["heads", "qkv"])
def test_at_full_rank_it_is_the_loss_of_the_stock_model(ranks: dict[str, int]) -> None:
    ours, stock = LM.build(ranks).train(), LM.build_stock().train()
    for options in ({}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}):
        losses = []
        for model in (ours, stock):
            batch = LM.batch()
            torch.manual_seed(2)
            losses.append(model(**batch, **options).loss)
        assert_close(*losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("training", "labelled", "logits"),
    [(True, True, False), (True, False, True), (False, True, True), (False, False, True)],
)
def test_when_the_output_has_logits(training: bool, labelled: bool, logits: bool) -> None:
    model, batch = LM.build(LOW, **NO_DROPOUT).train(training), LM.batch()
    if not labelled:
        del batch["labels"]
    outputs = model(**batch, output_hidden_states=True)
    assert (outputs.logits is not None) == logits
    assert (outputs.loss is not None) == labelled
    assert "hidden_states" in outputs
    if logits:
        assert outputs.logits.shape == WHOLE
    first = model(**batch, return_dict=False)[0]
    assert_close(first, outputs.loss if labelled else outputs.logits, **EXACT)


@each_vocabulary
def test_a_batch_without_labels_contributes_nothing(ranks: dict[str, int]) -> None:
    model, batch = LM.build(ranks, **NO_DROPOUT).train(), LM.batch()
    result = loss_and_gradients(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert all((value == 0).all() for value in result.values())


@each_vocabulary
def test_half_precision_loses_no_more_than_with_logits(ranks: dict[str, int]) -> None:
    model = LM.build(ranks, **NO_DROPOUT).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = loss_and_gradients(model, LM.batch())
        model.config.fused_loss = False
        whole = loss_and_gradients(model, LM.batch())
    model.config.fused_loss = True
    assert fused["loss"].dtype == torch.float32
    assert_close(fused["loss"], whole["loss"], rtol=1e-3, atol=0)
    for name, slope in whole.items():
        assert_close(fused[name], slope, rtol=0.1, atol=0.02 * max(slope.abs().max().item(), 0.1), msg=name)
    assert model.to(torch.bfloat16)(**LM.batch()).loss.dtype == torch.float32


def test_a_step_reads_what_its_positions_and_embeddings_say() -> None:
    model, batch = LM.build(LOW, **NO_DROPOUT).train(), LM.batch()
    expected = run(model, batch)["loss"]
    embedded = {**batch, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    del embedded["input_ids"]
    assert_close(run(model, embedded)["loss"], expected, **EXACT)
    shifted = {**batch, "position_ids": torch.arange(1, LENGTH + 1)[None]}
    assert run(model, shifted)["loss"] != expected


def test_a_label_outside_the_vocabulary_is_refused() -> None:
    batch: dict[str, Any] = LM.batch()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1, 3] = SIZES["vocab_size"]
    with pytest.raises(IndexError, match="out of bounds"):
        LM.build(LOW).train()(**batch)
