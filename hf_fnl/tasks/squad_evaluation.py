"""Answers to SQuAD questions: read off from a model's logits, written in the official JSON, and scored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_fnl.tasks.metrics.squad_scores import score_squad
from hf_fnl.tasks.squad import SquadOptions, build_squad_features
from hf_fnl.utils.files import write_json


def first_questions(examples: Dataset, limit: int | None) -> tuple[Dataset, bool]:
    """Return the first ``limit`` questions, or all, and whether some of all have no answer, as in SQuAD 2.0 only."""
    chosen = examples if limit is None else examples.select(range(min(limit, len(examples))))
    return chosen, not all(answers["text"] for answers in examples["answers"])


def answer_questions(
    trainer: Trainer,
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: SquadOptions,
    *,
    folder: str | Path,
    version_2: bool,
    num_proc: int | None = None,
) -> dict[str, float]:
    """Answer every question, write ``predictions.json`` in the official format and score the answers.

    Args:
        trainer: Holds the model, any with start and end logits, and a ``DataCollatorWithPadding``.
        examples: Questions, as :func:`~hf_fnl.tasks.squad.load_squad` returns them.
        tokenizer: The model's tokenizer.
        options: How contexts are cut and answers read off.
        folder: Where the predictions go.
        version_2: Rules of SQuAD 2.0 instead of 1.1.
        num_proc: Processes that tokenize.

    Returns:
        ``exact_match`` and ``f1`` in percent, or the figures of version 2.0.
    """
    features = build_squad_features(examples, tokenizer, options, train=False, num_proc=num_proc)
    with _all_logits_in_order(trainer.args):
        start_logits, end_logits = trainer.predict(features).predictions[:2]
    answers = decode_predictions(examples, features, start_logits, end_logits, options, version_2=version_2)
    if trainer.is_world_process_zero():
        write_json(Path(folder) / "predictions.json", answers)
    return score_predictions(examples, answers, version_2=version_2)


@contextlib.contextmanager
def _all_logits_in_order(args: TrainingArguments) -> Iterator[None]:
    """Set aside options of a training and its evaluations after which a prediction has other rows, or none."""
    needed = {
        "train_sampling_strategy": "random",  # one that groups by length reorders what is predicted too
        "eval_do_concat_batches": True,
        "prediction_loss_only": False,
        "remove_unused_columns": True,
    }
    before = {name: getattr(args, name) for name in needed}
    vars(args).update(needed)
    try:
        yield
    finally:
        vars(args).update(before)


def decode_predictions(
    examples: Dataset,
    features: Dataset,
    start_logits: NDArray[Any],
    end_logits: NDArray[Any],
    options: SquadOptions,
    *,
    version_2: bool,
) -> dict[str, str]:
    """Turn logits into answers: the span of highest start logit plus end logit over all windows of a question.

    A span lies in the context part of one window, does not end before it starts and has at most ``max_answer_length``
    tokens. The search is exhaustive; the text is cut from the context, not put together from tokens.

    Args:
        examples: Questions as :func:`~hf_fnl.tasks.squad.load_squad` returns them.
        features: Their windows, from :func:`~hf_fnl.tasks.squad.build_squad_features` with ``train=False``.
        start_logits: One row for each window, at least as wide as the longest window.
        end_logits: The same for ends.
        options: ``max_answer_length`` and ``null_score_diff_threshold`` count here.
        version_2: Weigh each answer against none, which scores as the first token does in the window that says least.

    Returns:
        The answer to each question by its id; empty where version 2.0 says that there is none.

    Raises:
        ValueError: If shapes do not fit, logits are not finite, or the windows are not those of the questions.
    """
    contexts = dict(zip(examples["id"], examples["context"], strict=True))
    if contexts.keys() != set(features["example_id"]):
        raise ValueError(f"the windows are not those of the {len(contexts)} questions that were given")
    spans = [np.array(spans) for spans in features["offset_mapping"]]
    width = max(map(len, spans))
    starts, ends = (_checked_logits(logits, len(spans), width) for logits in (start_logits, end_logits))
    best, null = dict.fromkeys(contexts, (-np.inf, "")), dict.fromkeys(contexts, np.inf)
    for window, owner in enumerate(features["example_id"]):
        score, (first, last) = _best_span(starts[window], ends[window], spans[window], options.max_answer_length)
        if score > best[owner][0]:
            best[owner] = score, contexts[owner][first:last].strip()
        null[owner] = min(null[owner], starts[window, 0] + ends[window, 0])
    threshold = options.null_score_diff_threshold if version_2 else np.inf
    return {id_: "" if null[id_] - score > threshold else text for id_, (score, text) in best.items()}


def _checked_logits(logits: NDArray[Any], windows: int, width: int) -> NDArray[np.float64]:
    """Return logits cut to the length of the longest window."""
    if logits.ndim != 2 or len(logits) != windows or logits.shape[1] < width:
        raise ValueError(f"logits must be of {windows} windows of at least {width} tokens, got shape {logits.shape}")
    cut = np.asarray(logits[:, :width], dtype=np.float64)
    if not np.isfinite(cut).all():
        raise ValueError("logits hold NaN or Inf; the model has diverged")
    return cut


def _best_span(
    start_logits: NDArray[np.float64], end_logits: NDArray[np.float64], spans: NDArray[np.int64], max_length: int
) -> tuple[float, tuple[int, int]]:
    """Return the highest score of an allowed span of a window, and its characters in the context."""
    outside = np.where(spans[:, 0] < 0, -np.inf, 0)
    ends = np.pad(end_logits[: len(spans)] + outside, (0, max_length - 1), constant_values=-np.inf)
    # scores[s, d] is that of the span from token s to token s + d.
    scores = (start_logits[: len(spans)] + outside)[:, None] + np.lib.stride_tricks.sliding_window_view(
        ends, max_length
    )
    first, extra = divmod(int(scores.argmax()), max_length)
    return float(scores[first, extra]), (int(spans[first, 0]), int(spans[first + extra, 1]))


def score_predictions(examples: Dataset, predictions: Mapping[str, str], *, version_2: bool) -> dict[str, float]:
    """Score answers by question id; see :func:`~hf_fnl.tasks.metrics.squad_scores.score_squad`."""
    references = {id_: answers["text"] for id_, answers in zip(examples["id"], examples["answers"], strict=True)}
    return score_squad(predictions, references, version_2=version_2)
