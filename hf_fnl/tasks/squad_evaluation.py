"""Answering a question set with a Trainer's model, and scoring the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_fnl.tasks.squad import (
    SquadOptions,
    build_squad_features,
    decode_predictions,
    is_version_2,
    score_predictions,
    write_predictions,
)


@contextlib.contextmanager
def _in_order(args: TrainingArguments) -> Iterator[None]:
    """A strategy that groups training examples by length reorders what is predicted too: not while in here."""
    strategy, args.train_sampling_strategy = args.train_sampling_strategy, "random"
    try:
        yield
    finally:
        args.train_sampling_strategy = strategy


def answer_questions(
    trainer: Trainer,
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: SquadOptions,
    *,
    folder: str | Path,
    num_proc: int | None = None,
) -> dict[str, float]:
    """Answer every question, write the official prediction files into ``folder`` and score them.

    Args:
        trainer: Holds the model, any with start and end logits, and a ``SquadCollator`` or a
            ``PackingCollator``.
        examples: Questions, as ``load_squad`` gives them.
        tokenizer: The model's tokenizer.
        options: How contexts are cut and answers read off.
        folder: Where ``predictions.json`` and its companions go.
        num_proc: Processes that tokenize.

    Returns:
        ``exact_match`` and ``f1`` in percent, and for version 2.0 their parts.
    """
    version_2 = is_version_2(examples)
    features = build_squad_features(examples, tokenizer, options, train=False, num_proc=num_proc)
    with _in_order(trainer.args):
        start_logits, end_logits = trainer.predict(features).predictions[:2]
    predictions = decode_predictions(examples, features, start_logits, end_logits, options, version_2=version_2)
    if trainer.is_world_process_zero():
        write_predictions(folder, predictions)
    return score_predictions(examples, predictions, version_2=version_2)
