"""Training on sentence pairs: the loss over target tokens at any layout, resuming, optimizers, validation figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import launch, launches
from torch.nn import functional as F
from training_cases import losses
from translation_cases import tiny_trainer

from hf_fnl.tasks.translation_training import TranslationArguments, smoothed_cross_entropy

ROOT = Path(__file__).parents[2]


def logits_and_labels(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator).to(dtype)
    labels = torch.randint(11, (3, 5), generator=generator)
    labels[0, 3:] = labels[2, 1:] = -100
    return logits, labels


def reference_loss(logits, labels, smoothing):
    """fairseq's formula, position by position; the sum."""
    log_probabilities = logits.double().log_softmax(-1)
    total = 0.0
    for row in zip(log_probabilities.flatten(0, 1), labels.flatten(), strict=True):
        if row[1] != -100:
            total -= (1 - smoothing) * row[0][row[1]] + smoothing / logits.shape[-1] * row[0].sum()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_the_loss_is_fairseqs_formula(smoothing, dtype):
    logits, labels = logits_and_labels(dtype)
    expected = reference_loss(logits, labels, smoothing)
    found = smoothed_cross_entropy(logits, labels, smoothing)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected / 9), rel=1e-6)
    assert float(smoothed_cross_entropy(logits, labels, smoothing, 31)) == pytest.approx(float(expected / 31), rel=1e-6)


def test_accumulated_batches_give_the_gradient_of_their_union(tmp_path):
    """One step of two batches of different size equals a loss over all their tokens."""
    trainer = tiny_trainer(
        tmp_path, max_steps=1, max_tokens=370, gradient_accumulation_steps=2, optim="sgd", weight_decay=0.0
    )
    batches = list(trainer.get_train_dataloader())[:2]
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert counts[0] != counts[1]
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    total = sum(
        smoothed_cross_entropy(trainer.model(**{**batch, "labels": None}).logits, batch["labels"], 0.1, sum(counts))
        for batch in batches
    )
    total.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    trainer.train()
    assert losses(trainer) == pytest.approx([total.item()], rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(dict(trainer.model.named_parameters())[name], before[name] - 0.02 * gradient)


def test_no_cache_is_filled_and_the_model_sees_no_labels(tmp_path):
    trainer = tiny_trainer(tmp_path)
    (batch, *_) = trainer.get_train_dataloader()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.past_key_values is None
    assert outputs.loss is None
    expected = F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_evaluation_is_per_token_and_without_smoothing(tmp_path):
    trainer = tiny_trainer(tmp_path, per_device_eval_batch_size=5, label_smoothing_factor=0.3)
    metrics = trainer.evaluate()
    trainer.model.requires_grad_(False)
    total, tokens, right = 0.0, 0, 0
    for batch in trainer.get_eval_dataloader():
        logits = trainer.model(**{**batch, "labels": None}).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        tokens += int((batch["labels"] != -100).sum())
    assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-4)
    assert metrics["eval_token_accuracy"] == pytest.approx(right / tokens)


def test_resuming_repeats_the_run(tmp_path):
    """Across the end of an epoch, with dropout; the batches after the checkpoint are those not seen before it."""
    options = {"max_steps": 11, "save_strategy": "steps", "save_steps": 5, "dropout": 0.2}
    whole = tiny_trainer(tmp_path / "whole", **options)
    whole.train()
    assert whole.state.num_train_epochs == 3
    again = tiny_trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert losses(again) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_epochs_differ(tmp_path):
    trainer = tiny_trainer(tmp_path, learning_rate=0.0, num_train_epochs=2, max_steps=-1, weight_decay=0.0)
    trainer.train()
    first, second = np.split(np.array(losses(trainer)), 2)
    assert sorted(first) == pytest.approx(sorted(second), rel=0.05)
    assert list(first) != pytest.approx(list(second))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size changes no batches of max_tokens"),
        ({"label_smoothing_factor": 1.0}, r"label_smoothing_factor must be in \[0, 1\), got 1.0"),
        ({"label_smoothing_factor": -0.1}, r"label_smoothing_factor must be in \[0, 1\), got -0.1"),
        ({"optim": "nag"}, "optim must be flambe, lamb or one of Transformers' optimizers, got 'nag'"),
    ],
    ids=["max_tokens", "found size", "all smoothed", "negative", "optim"],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        TranslationArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def run_two_processes(folder: Path) -> dict:
    codes, output = launch(ROOT / "tests/support/workers/translation_parallel.py", str(folder))
    assert not any(codes), output
    return json.loads((folder / "facts.json").read_text())


@launches
def test_two_processes_share_the_batches_equal_accumulation_and_resume(tmp_path):
    two = run_two_processes(tmp_path)
    assert two["distributed_type"] == "DistributedType.MULTI_CPU"
    one = tiny_trainer(tmp_path / "one", max_steps=7, gradient_accumulation_steps=2)
    one.train()
    assert two["losses"] == pytest.approx(losses(one), rel=1e-4)
    first, second = two["batches"]
    assert len(first) == len(second) == 7
    assert all(mine != other for mine, other in zip(first, second, strict=True))
    # The checkpoint was made within a later epoch than the first.
    assert two["steps_per_epoch"] < 3
    assert two["resumed_batches"] == [share[3:] for share in two["batches"]]
    assert two["resumed_losses"] == two["losses"]
