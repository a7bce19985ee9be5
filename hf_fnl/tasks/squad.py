"""Extractive question answering in SQuAD format, versions 1.1 and 2.0: questions, windows over contexts, decoding.

Nothing here knows a model class: any model that gives a start and an end logit for each token is served.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from hf_fnl.tasks.embedded import embedded_squad
from hf_fnl.tasks.metrics.squad_predictions import (
    SquadPredictions,
    is_version_2,
    load_squad_metric,
    score_predictions,
    write_predictions,
)
from hf_fnl.utils.hub import check_source

__all__ = [
    "SquadCollator",
    "SquadOptions",
    "SquadPredictions",
    "build_squad_features",
    "decode_predictions",
    "is_version_2",
    "load_squad",
    "load_squad_metric",
    "score_predictions",
    "write_predictions",
]

SQUAD_FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)
_DECODED_AT_ONCE = 128  # windows; holds the memory of decoding to some tens of megabytes


@dataclass(frozen=True, kw_only=True)
class SquadOptions:
    """How questions are cut into windows and answers are read off; the defaults are those of BERT.

    Args:
        max_seq_length: Tokens of a window at most: special tokens, question and a part of the context.
        doc_stride: Tokens of context that a window shares with the next one.
        max_query_length: Tokens of a question at most; the rest is cut off.
        n_best_size: Answers kept for each question.
        max_answer_length: Tokens of an answer at most.
        null_score_diff_threshold: A question is answered by the empty text (version 2.0 only) where the score of no
            answer exceeds that of the best answer by more than this.

    Raises:
        ValueError: If a number is too small, or question and ``doc_stride`` leave no room in a window.
    """

    max_seq_length: int = 384
    doc_stride: int = 128
    max_query_length: int = 64
    n_best_size: int = 20
    max_answer_length: int = 30
    null_score_diff_threshold: float = 0.0

    def __post_init__(self) -> None:
        for option in ("max_seq_length", "max_query_length", "n_best_size", "max_answer_length"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, got {getattr(self, option)}")
        if self.doc_stride < 0:
            raise ValueError(f"doc_stride must be at least 0, got {self.doc_stride}")
        self.check_room(special_tokens=3)

    def check_room(self, special_tokens: int) -> None:
        """Raise a ``ValueError`` if a window beside the longest question holds no more than its shared tokens."""
        room = self.max_seq_length - self.max_query_length - special_tokens
        if room <= self.doc_stride:
            raise ValueError(
                f"max_seq_length {self.max_seq_length} leaves {max(room, 0)} tokens of context beside a question of "
                f"max_query_length {self.max_query_length} and {special_tokens} special tokens, but doc_stride "
                f"{self.doc_stride} must be below that; lower doc_stride or max_query_length, or raise max_seq_length"
            )


def load_squad(source: str | os.PathLike[str], *, split: str, limit: int | None = None) -> Dataset:
    """Load questions with the columns ``id``, ``title``, ``context``, ``question`` and ``answers``.

    ``answers`` holds the lists ``text`` and ``answer_start`` (in characters); a question without answer has empty ones.

    Args:
        source: "embedded", a JSON file in the official structure of SQuAD 1.1 or 2.0, or the id of a Hub data set.
        split: Split of the Hub data set or of the embedded questions; a file is one split whatever this says.
        limit: Keep the first so many questions.

    Raises:
        FileNotFoundError: If ``source`` names a JSON file that is not there.
        ValueError: If the data are empty, truncated, of another structure, or inconsistent: repeated ids, empty
            contexts, answers that do not stand in their context.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 question (or None for all), got {limit}")
    name = os.fspath(source)
    if name == "embedded":
        examples = _from_official(embedded_squad(split), name)
    elif name.endswith(".json") or Path(name).is_file():
        examples = _from_official(_read_json(Path(name)), name)
    else:
        check_source(name, "dataset")
        examples = load_dataset(name, split=split)
        if missing := SQUAD_FEATURES.keys() - set(examples.column_names):
            raise ValueError(f"{name} has no column {sorted(missing)}; its columns are {examples.column_names}")
        examples = examples.select_columns(list(SQUAD_FEATURES)).cast(SQUAD_FEATURES)
    _check_examples(examples, name)
    return examples if limit is None else examples.select(range(min(limit, len(examples))))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such SQuAD file: {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON, perhaps truncated: {error}; fetch or write it again") from error


def _from_official(content: Any, name: str) -> Dataset:
    """Flatten the nested structure of the official files into one row a question."""
    try:
        rows = list(_official_rows(content))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} is not in the official SQuAD structure "
            "{'data': [{'title', 'paragraphs': [{'context', 'qas': [{'id', 'question', 'answers'}]}]}]}: "
            f"{type(error).__name__} {error}"
        ) from error
    if not rows:
        raise ValueError(f"{name} holds no questions")
    return Dataset.from_list(rows, features=SQUAD_FEATURES)


def _official_rows(content: Any) -> Iterator[dict[str, Any]]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question.get("is_impossible", False) else question["answers"]
                yield {
                    "id": question["id"],
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": {
                        "text": [answer["text"] for answer in answers],
                        "answer_start": [answer["answer_start"] for answer in answers],
                    },
                }


def _check_examples(examples: Dataset, name: str) -> None:
    if not len(examples):
        raise ValueError(f"{name} holds no questions")
    repeated = [id_ for id_, count in Counter(examples["id"]).items() if count > 1]
    if repeated:
        raise ValueError(f"{name}: {len(repeated)} question ids are repeated, first {repeated[0]!r}; rename them")
    misplaced = []
    for id_, context, answers in zip(examples["id"], examples["context"], examples["answers"], strict=True):
        if not context.strip():
            raise ValueError(f"{name}: the context of question {id_!r} is empty; leave that question out")
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            found = context[start : start + len(text)] if start >= 0 else ""
            if not text or found != text:
                misplaced.append(f"{id_!r}, whose answer is {text!r} but whose context reads {found!r} at {start}")
    if misplaced:
        raise ValueError(
            f"{name}: {len(misplaced)} answers do not stand in their context; first: {misplaced[0]}. "
            "Set answer_start to the offset of the text in the context, in characters, or leave those questions out"
        )


def build_squad_features(
    examples: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: SquadOptions,
    *,
    train: bool,
    num_proc: int | None = None,
) -> Dataset:
    """Cut each question with its context into overlapping windows of token ids, not padded.

    Args:
        examples: Questions as :func:`load_squad` gives them.
        tokenizer: A fast tokenizer that pads on the right.
        options: Sizes of the windows.
        train: Add ``start_positions`` and ``end_positions``, the tokens of the first answer; both are 0, the ``[CLS]``
            token, where that does not lie wholly in the window. Otherwise add what decoding needs: ``example_id`` and,
            for each token, ``offset_starts`` and ``offset_ends``, its characters in the context, -1 outside of it.
        num_proc: Processes to spread the work over.

    Returns:
        One row a window, those of a question in the order of its context.

    Raises:
        ValueError: If the tokenizer does not fit, a window has no room, or a context holds no token.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"windows need the offsets of a fast tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.padding_side != "right":
        raise ValueError(f'windows are padded on the right: set padding_side="right", got {tokenizer.padding_side!r}')
    if options.max_seq_length > tokenizer.model_max_length:
        raise ValueError(
            f"max_seq_length {options.max_seq_length} is above the {tokenizer.model_max_length} tokens "
            f"of the tokenizer's model; lower max_seq_length"
        )
    options.check_room(tokenizer.num_special_tokens_to_add(pair=True))
    return examples.map(
        _windows,
        batched=True,
        remove_columns=examples.column_names,
        fn_kwargs={"tokenizer": tokenizer, "options": options, "train": train},
        num_proc=num_proc,
        desc="SQuAD windows",
    )


def _windows(
    batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: SquadOptions, train: bool
) -> dict[str, list[Any]]:
    """Windows of a batch of questions; see :func:`build_squad_features`."""
    encoded = tokenizer(
        _shortened(batch["question"], tokenizer, options.max_query_length),
        batch["context"],
        truncation="only_second",
        max_length=options.max_seq_length,
        stride=options.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners = encoded.pop("overflow_to_sample_mapping")
    extra: dict[str, list[Any]] = {}
    for window, (owner, offsets) in enumerate(zip(owners, encoded.pop("offset_mapping"), strict=True)):
        spans = _context_spans(batch["context"][owner], encoded.sequence_ids(window), offsets)
        if spans.max() < 0:
            raise ValueError(f"the context of question {batch['id'][owner]!r} holds no token; leave that question out")
        if train:
            start, end = _answer_tokens(spans, batch["answers"][owner])
            row: dict[str, Any] = {"start_positions": start, "end_positions": end}
        else:
            row = {"example_id": batch["id"][owner], "offset_starts": spans[:, 0], "offset_ends": spans[:, 1]}
        for column, value in row.items():
            extra.setdefault(column, []).append(value)
    return {**encoded, **extra}


def _shortened(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_query_length: int) -> list[str]:
    """Questions without leading white space, cut after their first ``max_query_length`` tokens."""
    stripped = [question.lstrip() for question in questions]
    encoded = tokenizer(
        stripped, add_special_tokens=False, truncation=True, max_length=max_query_length, return_offsets_mapping=True
    )
    ends = [offsets[-1][1] if len(offsets) == max_query_length else None for offsets in encoded["offset_mapping"]]
    return [question[:end] for question, end in zip(stripped, ends, strict=True)]


def _context_spans(context: str, sequences: Sequence[int | None], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Start and end in ``context`` of each token, -1 for tokens of the question, of white space or of no width."""
    spans = [
        span if sequence == 1 and context[slice(*span)].strip() else (-1, -1)
        for sequence, span in zip(sequences, offsets, strict=True)
    ]
    return np.array(spans, dtype=np.int32)


def _answer_tokens(spans: np.ndarray, answers: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """First and last token of the first answer, or (0, 0) where it is not wholly within the window."""
    if not answers["text"]:
        return 0, 0
    text = answers["text"][0]
    # A few official answers begin or end in white space, which no token covers.
    first = answers["answer_start"][0] + len(text) - len(text.lstrip())
    last = first + len(text.strip())
    (context,) = np.nonzero(spans[:, 0] >= 0)
    starts, ends = spans[context].T
    if first < starts[0] or last > ends[-1]:
        return 0, 0
    start = np.searchsorted(ends, first, side="right")
    end = np.searchsorted(starts, last, side="left") - 1
    return (int(context[start]), int(context[end])) if start <= end else (0, 0)


def decode_predictions(
    examples: Dataset,
    features: Dataset,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    options: SquadOptions,
    *,
    version_2: bool,
) -> SquadPredictions:
    """Turn logits into answers: the spans of highest start logit plus end logit over all windows of a question.

    A span lies in the context part of one window, does not end before it starts and has at most ``max_answer_length``
    tokens. The search is exhaustive; the text is cut from the context, so it is never re-assembled from tokens.

    Args:
        examples: Questions as :func:`load_squad` gives them.
        features: Their windows, from :func:`build_squad_features` with ``train=False``.
        start_logits: One row a window, at least as wide as the longest window.
        end_logits: The same for ends.
        options: ``n_best_size``, ``max_answer_length`` and ``null_score_diff_threshold`` count here.
        version_2: Weigh each answer against none, which scores as the first token does in the window that says least.

    Returns:
        Predictions for every question, in the order of ``examples``.

    Raises:
        ValueError: If shapes do not fit, logits are not finite, or windows and questions do not belong together.
    """
    starts, ends = _padded(features, "offset_starts"), _padded(features, "offset_ends")
    start_logits = _checked_logits("start_logits", start_logits, starts.shape)
    end_logits = _checked_logits("end_logits", end_logits, starts.shape)
    ids = list(examples["id"])
    owners = _owners(ids, features["example_id"])
    windows, first, last = _best_spans(start_logits, end_logits, starts >= 0, options)
    spans = np.stack([starts[windows, first], ends[windows, last]], axis=1)
    logits = np.stack([start_logits[windows, first], end_logits[windows, last]], axis=1).astype(np.float64)
    ranked = _ranked_by_owner(owners[windows], -logits.sum(axis=1), len(ids))
    null_logits = np.stack([start_logits[:, 0], end_logits[:, 0]], axis=1).astype(np.float64)
    null_ranked = _ranked_by_owner(owners, null_logits.sum(axis=1), len(ids))

    texts, nbest, null_odds = {}, {}, {}
    for id_, context, rows, null_rows in zip(ids, examples["context"], ranked, null_ranked, strict=True):
        answers = _distinct_answers(context, spans[rows].tolist(), logits[rows].tolist(), options.n_best_size)
        null = _answer("", *null_logits[null_rows[0]].tolist())
        odds = _score(null) - _score(answers[0])
        texts[id_] = "" if version_2 and odds > options.null_score_diff_threshold else answers[0]["text"]
        nbest[id_] = _with_probabilities([*answers, null] if version_2 else answers)
        if version_2:
            null_odds[id_] = odds
    return SquadPredictions(texts, nbest, null_odds, options.null_score_diff_threshold)


def _padded(features: Dataset, column: str) -> np.ndarray:
    """A column of integer lists as one matrix, -1 where a list has ended."""
    if not len(features):
        raise ValueError("there are no windows to decode; build them with build_squad_features(..., train=False)")
    lists = features.select_columns(column).with_format("arrow")[:][column].combine_chunks()
    lengths = np.diff(lists.offsets)
    padded = np.full((len(lists), lengths.max()), -1, dtype=np.int32)
    padded[np.arange(lengths.max()) < lengths[:, None]] = lists.flatten()
    return padded


def _checked_logits(name: str, logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Logits cut to the width of the longest window."""
    if logits.ndim != 2 or len(logits) != shape[0] or logits.shape[1] < shape[1]:
        raise ValueError(f"{name} must hold {shape[0]} windows of at least {shape[1]} tokens, got shape {logits.shape}")
    cut = np.asarray(logits[:, : shape[1]], dtype=np.float32)
    if not np.isfinite(cut).all():
        raise ValueError(f"{name} hold NaN or Inf; the model has diverged")
    return cut


def _owners(ids: Sequence[str], example_ids: Sequence[str]) -> np.ndarray:
    """Index in ``ids`` of the question of each window."""
    index = {id_: position for position, id_ in enumerate(ids)}
    if index.keys() != set(example_ids):
        raise ValueError(
            f"the windows belong to {len(set(example_ids))} questions, which are not the {len(index)} given; "
            "pass the examples that the features were built from"
        )
    return np.array([index[id_] for id_ in example_ids])


def _best_spans(
    start_logits: np.ndarray, end_logits: np.ndarray, in_context: np.ndarray, options: SquadOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``n_best_size`` allowed spans of highest score of every window, as window, first token and last token."""
    length = min(options.max_answer_length, start_logits.shape[1])
    found = []
    for offset in range(0, len(start_logits), _DECODED_AT_ONCE):
        chunk = slice(offset, offset + _DECODED_AT_ONCE)
        start, end = (np.where(in_context[chunk], logits[chunk], -np.inf) for logits in (start_logits, end_logits))
        end = np.pad(end, ((0, 0), (0, length - 1)), constant_values=-np.inf)
        # scores[w, s, d] is that of the span from token s to token s + d of window w.
        scores = start[:, :, None] + np.lib.stride_tricks.sliding_window_view(end, length, axis=1)
        scores = scores.reshape(len(scores), -1)
        kept = min(options.n_best_size, scores.shape[1])
        best = np.sort(np.argpartition(-scores, kept - 1, axis=1)[:, :kept], axis=1)
        window, rank = np.nonzero(np.isfinite(np.take_along_axis(scores, best, axis=1)))
        first, extra = np.divmod(best[window, rank], length)
        found.append((window + offset, first, first + extra))
    windows, first, last = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return windows, first, last


def _ranked_by_owner(owners: np.ndarray, costs: np.ndarray, count: int) -> list[np.ndarray]:
    """For each of ``count`` owners its positions in ``owners``, by ascending cost, ties in the order given."""
    order = np.lexsort((costs, owners))
    return np.split(order, np.searchsorted(owners[order], np.arange(1, count)))


def _distinct_answers(
    context: str, spans: Sequence[Sequence[int]], logits: Sequence[Sequence[float]], limit: int
) -> list[dict[str, Any]]:
    """The first ``limit`` different spans of a ranked list; overlapping windows hold the same span more than once."""
    distinct: dict[tuple[int, ...], dict[str, Any]] = {}
    for (start, end), pair in zip(spans, logits, strict=True):
        distinct.setdefault((start, end), _answer(context[start:end].strip(), *pair))
        if len(distinct) == limit:
            break
    return list(distinct.values())


def _answer(text: str, start_logit: float, end_logit: float) -> dict[str, Any]:
    return {"text": text, "start_logit": start_logit, "end_logit": end_logit}


def _score(answer: Mapping[str, Any]) -> float:
    return answer["start_logit"] + answer["end_logit"]


def _with_probabilities(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers by descending score, each with its share in the softmax over all their scores."""
    ranked = sorted(answers, key=_score, reverse=True)
    weights = np.exp([_score(answer) - _score(ranked[0]) for answer in ranked])
    probabilities = (weights / weights.sum()).tolist()
    return [{**answer, "probability": value} for answer, value in zip(ranked, probabilities, strict=True)]


@dataclass(frozen=True)
class SquadCollator:
    """Pad windows to the longest of the batch; columns that only decoding needs are dropped.

    Args:
        tokenizer: Knows the model's inputs and how to pad them.
        pad_to_multiple_of: Round the length up to a multiple of this.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a batch of tensors, one row a window."""
        kept = [*self.tokenizer.model_input_names, "start_positions", "end_positions"]
        rows = [{name: row[name] for name in kept if name in row} for row in features]
        return dict(
            pad_without_fast_tokenizer_warning(
                self.tokenizer, rows, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt"
            )
        )
