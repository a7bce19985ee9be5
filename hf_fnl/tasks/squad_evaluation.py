"""Answers to SQuAD questions: read off from a model's logits, written in the official JSON, and scored."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from hf_fnl.tasks.metrics.squad_scores import score_squad
from hf_fnl.tasks.squad import SquadOptions, build_squad_features
from hf_fnl.utils.files import write_json

Answer = dict[str, Any]


class SquadPredictions(NamedTuple):
    """Answers by question id.

    Attributes:
        predictions: The answer to each question; empty where version 2.0 predicts that there is none.
        nbest: The best answers with ``text``, ``probability``, ``start_logit`` and ``end_logit``, best first.
        null_odds: Score of no answer minus that of the best answer (version 2.0; empty under version 1.1).
    """

    predictions: dict[str, str]
    nbest: dict[str, list[Answer]]
    null_odds: dict[str, float]


def is_version_2(examples: Dataset) -> bool:
    """Return whether some question has no answer, which only SQuAD 2.0 knows."""
    return not all(answers["text"] for answers in examples["answers"])


def first_questions(examples: Dataset, limit: int | None) -> tuple[Dataset, bool]:
    """Return the first ``limit`` questions, or all, and whether all of them together are of version 2.0."""
    chosen = examples if limit is None else examples.select(range(min(limit, len(examples))))
    return chosen, is_version_2(examples)


def answer_questions(
    trainer: Trainer,
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: SquadOptions,
    *,
    folder: str | Path,
    num_proc: int | None = None,
    version_2: bool | None = None,
) -> dict[str, float]:
    """Answer every question, write the official prediction files into ``folder`` and score them.

    Args:
        trainer: Holds the model, any with start and end logits, and a ``DataCollatorWithPadding``.
        examples: Questions, as :func:`~hf_fnl.tasks.squad.load_squad` returns them.
        tokenizer: The model's tokenizer.
        options: How contexts are cut and answers read off.
        folder: Where ``predictions.json`` and its companions go.
        num_proc: Processes that tokenize.
        version_2: As in :func:`score_predictions`.

    Returns:
        ``exact_match`` and ``f1`` in percent, or the figures of version 2.0.
    """
    version_2 = is_version_2(examples) if version_2 is None else version_2
    features = build_squad_features(examples, tokenizer, options, train=False, num_proc=num_proc)
    with _in_order(trainer.args):
        start_logits, end_logits = trainer.predict(features).predictions[:2]
    predictions = decode_predictions(examples, features, start_logits, end_logits, options, version_2=version_2)
    if trainer.is_world_process_zero():
        write_predictions(folder, predictions)
    return score_predictions(examples, predictions.predictions, version_2=version_2)


@contextlib.contextmanager
def _in_order(args: TrainingArguments) -> Iterator[None]:
    """Switch off a strategy that groups training examples by length, for it reorders what is predicted too."""
    strategy, args.train_sampling_strategy = args.train_sampling_strategy, "random"
    try:
        yield
    finally:
        args.train_sampling_strategy = strategy


def decode_predictions(
    examples: Dataset,
    features: Dataset,
    start_logits: NDArray[Any],
    end_logits: NDArray[Any],
    options: SquadOptions,
    *,
    version_2: bool,
) -> SquadPredictions:
    """Turn logits into answers: the spans of highest start logit plus end logit over all windows of a question.

    A span lies in the context part of one window, does not end before it starts and has at most ``max_answer_length``
    tokens. The search is exhaustive; the text is cut from the context, not put together from tokens.

    Args:
        examples: Questions as :func:`~hf_fnl.tasks.squad.load_squad` returns them.
        features: Their windows, from :func:`~hf_fnl.tasks.squad.build_squad_features` with ``train=False``.
        start_logits: One row for each window, at least as wide as the longest window.
        end_logits: The same for ends.
        options: ``n_best_size``, ``max_answer_length`` and ``null_score_diff_threshold`` count here.
        version_2: Weigh each answer against none, which scores as the first token does in the window that says least.

    Raises:
        ValueError: If shapes do not fit, logits are not finite, or the windows are not those of the questions.
    """
    if not len(features):
        raise ValueError("there are no windows to decode; build them with build_squad_features(..., train=False)")
    spans = [np.array(spans) for spans in features["offset_mapping"]]
    starts = _checked_logits("start_logits", start_logits, len(spans), max(map(len, spans)))
    ends = _checked_logits("end_logits", end_logits, len(spans), max(map(len, spans)))
    windows: dict[str, list[int]] = {id_: [] for id_ in examples["id"]}
    owners = features["example_id"][:]
    if windows.keys() != set(owners):
        raise ValueError(
            f"the windows belong to {len(set(owners))} questions, which are not the {len(windows)} given; "
            "pass the examples that the features were built from"
        )
    for window, owner in enumerate(owners):
        windows[owner].append(window)
    texts, nbest, null_odds = {}, {}, {}
    for (id_, rows), context in zip(windows.items(), examples["context"], strict=True):
        found = [answer for row in rows for answer in _best_spans(starts[row], ends[row], spans[row], options)]
        answers = _distinct_answers(context, found, options.n_best_size)
        null = min((_answer("", starts[row, 0], ends[row, 0]) for row in rows), key=_score)
        odds = _score(null) - _score(answers[0])
        texts[id_] = "" if version_2 and odds > options.null_score_diff_threshold else answers[0]["text"]
        nbest[id_] = _with_probabilities([*answers, null] if version_2 else answers)
        if version_2:
            null_odds[id_] = odds
    return SquadPredictions(texts, nbest, null_odds)


def _checked_logits(name: str, logits: NDArray[Any], windows: int, length: int) -> NDArray[np.float32]:
    """Return logits cut to the length of the longest window."""
    if logits.ndim != 2 or len(logits) != windows or logits.shape[1] < length:
        raise ValueError(f"{name} must hold {windows} windows of at least {length} tokens, got shape {logits.shape}")
    cut = np.asarray(logits[:, :length], dtype=np.float32)
    if not np.isfinite(cut).all():
        raise ValueError(f"{name} hold NaN or Inf; the model has diverged")
    return cut


def _best_spans(
    start_logits: NDArray[np.float32], end_logits: NDArray[np.float32], spans: NDArray[np.int64], options: SquadOptions
) -> Iterator[tuple[int, int, float, float]]:
    """Yield the ``n_best_size`` allowed spans of highest score of a window: its characters and its two logits."""
    outside = np.where(spans[:, 0] < 0, -np.inf, 0)
    length = min(options.max_answer_length, len(spans))
    ends = np.pad(end_logits[: len(spans)] + outside, (0, length - 1), constant_values=-np.inf)
    # scores[s, d] is that of the span from token s to token s + d.
    scores = (start_logits[: len(spans)] + outside)[:, None] + np.lib.stride_tricks.sliding_window_view(ends, length)
    kept = min(options.n_best_size, scores.size)
    for place in np.argpartition(-scores, kept - 1, axis=None)[:kept].tolist():
        first, extra = divmod(place, length)
        if np.isfinite(scores[first, extra]):
            last = first + extra
            yield int(spans[first, 0]), int(spans[last, 1]), float(start_logits[first]), float(end_logits[last])


def _distinct_answers(context: str, found: list[tuple[int, int, float, float]], limit: int) -> list[Answer]:
    """Return the best ``limit`` different spans; overlapping windows hold the same span more than once."""
    best: dict[tuple[int, int], Answer] = {}
    for start, end, *logits in sorted(found, key=lambda span: (-span[2] - span[3], span[0], span[1])):
        best.setdefault((start, end), _answer(context[start:end].strip(), *logits))
    return list(best.values())[:limit]


def _answer(text: str, start_logit: float, end_logit: float) -> Answer:
    return {"text": text, "start_logit": float(start_logit), "end_logit": float(end_logit)}


def _score(answer: Answer) -> float:
    return answer["start_logit"] + answer["end_logit"]


def _with_probabilities(answers: list[Answer]) -> list[Answer]:
    """Return answers by descending score, each with its share in the softmax over all their scores."""
    ranked = sorted(answers, key=_score, reverse=True)
    weights = np.exp([_score(answer) - _score(ranked[0]) for answer in ranked])
    probabilities = (weights / weights.sum()).tolist()
    return [{**answer, "probability": value} for answer, value in zip(ranked, probabilities, strict=True)]


def write_predictions(folder: str | os.PathLike[str], predictions: SquadPredictions) -> None:
    """Write ``predictions.json`` in the official format, ``nbest_predictions.json`` and any ``null_odds.json``."""
    names = ("predictions", "nbest_predictions", "null_odds")
    for name, content in zip(names, predictions, strict=True):
        if content or name != "null_odds":
            write_json(Path(folder) / f"{name}.json", content)


def score_predictions(
    examples: Dataset, predictions: Mapping[str, str], *, version_2: bool | None = None
) -> dict[str, float]:
    """Score answers by the official rules; the names are those of :func:`~hf_fnl.tasks.metrics.squad_scores`.

    Args:
        examples: Questions as :func:`~hf_fnl.tasks.squad.load_squad` returns them.
        predictions: Their answers by question id.
        version_2: Rules of version 2.0 instead of 1.1. Default: whether some question has no answer.

    Raises:
        ValueError: If a question has no prediction.
    """
    references = {id_: answers["text"] for id_, answers in zip(examples["id"], examples["answers"], strict=True)}
    if missing := [id_ for id_ in references if id_ not in predictions]:
        raise ValueError(
            f"{len(missing)} of {len(references)} questions have no prediction, first {missing[0]!r}; "
            "give predictions made for these questions"
        )
    version_2 = is_version_2(examples) if version_2 is None else version_2
    return score_squad(predictions, references, version_2=version_2)
