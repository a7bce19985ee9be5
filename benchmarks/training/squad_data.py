"""SQuAD v1.1 as arrays: questions with windows of their contexts, and answers read off by a model's logits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from hf_fnl.tasks.metrics.squad_scores import score_squad

MAX_QUERY_LENGTH, MAX_ANSWER_LENGTH = 64, 30  # BERT's own
_CUT_AT_ONCE = 512  # questions


class Question(NamedTuple):
    """A question with its context and its answers."""

    id: str
    question: str
    context: str
    answers: list[dict[str, Any]]


@dataclass(frozen=True)
class Windows:
    """Windows ``[CLS] question [SEP] part of the context [SEP]``, padded with 0.

    Args:
        ids: Tokens, ``(windows, max_length)``.
        context_begins: First token of the context.
        lengths: Tokens without padding.
        starts: First token of the answer, 0 where it is not wholly in the window.
        ends: Its last token, likewise.
        owners: Number of the question.
        spans: Characters of the context that a token covers, ``(windows, max_length, 2)``, -1 outside of it.
    """

    ids: NDArray[np.uint16]
    context_begins: NDArray[np.int64]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    owners: NDArray[np.int64]
    spans: NDArray[np.int32]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read the questions of an official file, or the first ``limit``."""
    return [
        question for question, _ in zip(_questions(path), iter(range(limit)) if limit else iter(int, 1), strict=False)
    ]


def _questions(path: Path) -> Iterator[Question]:
    for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield Question(asked["id"], asked["question"].lstrip(), paragraph["context"], asked["answers"])


def squad_windows(path: Path, tokenizer: Tokenizer, max_length: int, stride: int, limit: int | None = None) -> Windows:
    """Cut questions with their contexts into windows, as BERT does.

    Args:
        path: An official file.
        tokenizer: Of BERT's kind, without a template of its own.
        max_length: Tokens of a window.
        stride: Tokens of context that a window shares with the next one.
        limit: Take the first so many questions; all unless given.
    """
    special = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    questions = read_questions(path, limit)
    rows: list[tuple[Any, ...]] = []
    for first in range(0, len(questions), _CUT_AT_ONCE):
        chunk = questions[first : first + _CUT_AT_ONCE]
        asked, contexts = (
            tokenizer.encode_batch([getattr(question, part) for question in chunk], add_special_tokens=False)
            for part in ("question", "context")
        )
        for number, (question, left, right) in enumerate(zip(chunk, asked, contexts, strict=True), first):
            rows += _windows(number, question, left.ids[:MAX_QUERY_LENGTH], right, special, max_length, stride)
    columns = (np.stack(column) for column in zip(*rows, strict=True))
    return Windows(*columns)


def _windows(
    number: int,
    question: Question,
    asked: Sequence[int],
    context: Encoding,
    special: tuple[int, int],
    max_length: int,
    stride: int,
) -> Iterator[tuple[Any, ...]]:
    """The windows of one question, as rows of :class:`Windows`."""
    cls, sep = special
    begin, room = len(asked) + 2, max_length - len(asked) - 3
    offsets = np.array(context.offsets, dtype=np.int32)
    answer = _answer_tokens(question.answers[0], offsets)
    first, last = 0, len(context.ids)
    while True:
        stop = min(first + room, last)
        ids, spans = np.zeros(max_length, np.uint16), np.full((max_length, 2), -1, np.int32)
        length = begin + stop - first + 1
        ids[:length] = [cls, *asked, sep, *context.ids[first:stop], sep]
        spans[begin : begin + stop - first] = offsets[first:stop]
        inside = first <= answer[0] <= answer[1] < stop
        start, end = (token - first + begin if inside else 0 for token in answer)
        yield ids, np.int64(begin), np.int64(length), np.int64(start), np.int64(end), np.int64(number), spans
        if stop == last:
            return
        first += room - stride


def _answer_tokens(answer: dict[str, Any], offsets: NDArray[np.int32]) -> tuple[int, int]:
    """First and last token of an answer in its context."""
    text: str = answer["text"]
    first = answer["answer_start"] + len(text) - len(text.lstrip())
    last = first + len(text.strip())
    start = int(np.searchsorted(offsets[:, 1], first, side="right"))
    end = int(np.searchsorted(offsets[:, 0], last, side="left")) - 1
    return start, end


def write_windows(path: Path, windows: Windows) -> None:
    """Write windows; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **dataclasses.asdict(windows))
    partial.replace(path)


def read_windows(path: Path) -> Windows:
    """Read what :func:`write_windows` wrote."""
    with np.load(path) as arrays:
        return Windows(**arrays)


def best_spans(start_logits: Tensor, end_logits: Tensor, in_context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first token, the last token and the score of the best answer in each window.

    Args:
        start_logits: ``(windows, length)``.
        end_logits: ``(windows, length)``.
        in_context: Tokens of the context, of which an answer has ``MAX_ANSWER_LENGTH`` at most.
    """
    start = start_logits.float().masked_fill(~in_context, -torch.inf)
    end = end_logits.float().masked_fill(~in_context, -torch.inf)
    end = torch.nn.functional.pad(end, (0, MAX_ANSWER_LENGTH - 1), value=-torch.inf)
    scores = start[:, :, None] + end.unfold(1, MAX_ANSWER_LENGTH, 1)  # of spans from s to s + d
    score, flat = scores.flatten(1).max(1)
    first = flat // MAX_ANSWER_LENGTH
    return first, first + flat % MAX_ANSWER_LENGTH, score


def score_answers(
    questions: Sequence[Question],
    windows: Windows,
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    scores: NDArray[np.float32],
) -> dict[str, float]:
    """Score the answers of the best window of each question by the official rules: ``exact_match`` and ``f1``.

    Args:
        questions: As :func:`read_questions` gives them.
        windows: Their windows.
        first: First token of the best answer of each window.
        last: Its last token.
        scores: Its score.
    """
    best: dict[int, int] = {}
    for window, owner in enumerate(windows.owners.tolist()):
        if owner not in best or scores[window] > scores[best[owner]]:
            best[owner] = window
    texts = {}
    for owner, window in best.items():
        begin, end = windows.spans[window, first[window], 0], windows.spans[window, last[window], 1]
        texts[questions[owner].id] = questions[owner].context[begin:end]
    return score_squad(texts, {question.id: [answer["text"] for answer in question.answers] for question in questions})
