"""Extractive question answering in SQuAD format, versions 1.1 and 2.0: questions, and windows over their contexts."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hf_fnl.tasks.embedded import embedded_squad
from hf_fnl.training.command_line import check_at_least
from hf_fnl.utils.hub import check_source

SPECIAL_TOKENS = 3  # of BERT, around a question and its context
SQUAD_FEATURES = Features(
    {
        "id": Value("string"),
        "title": Value("string"),
        "context": Value("string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
    }
)


@dataclass(kw_only=True)
class SquadOptions:
    """How questions are cut into windows and answers are read off; the defaults are those of BERT.

    Raises:
        ValueError: If a number is too small, or question and ``doc_stride`` leave no room in a window.
    """

    max_seq_length: int = field(
        default=384, metadata={"help": "Tokens of a window: special tokens, question and a part of the context."}
    )
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows share."})
    max_query_length: int = field(default=64, metadata={"help": "Tokens of a question; the rest is cut off."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer."})
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "Answer nothing (SQuAD 2.0) where its score exceeds the best answer's by more than this."},
    )

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_seq_length", "max_query_length", "max_answer_length")
        check_at_least(0, self, "doc_stride")
        room = self.max_seq_length - self.max_query_length - SPECIAL_TOKENS
        if room <= self.doc_stride:
            raise ValueError(
                f"max_seq_length {self.max_seq_length} leaves {max(room, 0)} tokens of context beside a question of "
                f"max_query_length {self.max_query_length} and {SPECIAL_TOKENS} special tokens, but doc_stride "
                f"{self.doc_stride} must be below that; lower doc_stride or max_query_length, or raise max_seq_length"
            )


def load_squad(source: str | os.PathLike[str], *, split: str) -> Dataset:
    """Load questions with the columns ``id``, ``title``, ``context``, ``question`` and ``answers``.

    ``answers`` holds the lists ``text`` and ``answer_start`` (in characters), empty where there is no answer.

    Args:
        source: "embedded", a JSON file in the official structure of SQuAD 1.1 or 2.0, or the id of a Hub data set.
        split: Split of the Hub data set or of the embedded questions; a file is one split whatever this says.

    Raises:
        FileNotFoundError: If ``source`` names a JSON file that is not there.
        ValueError: If the data are empty, truncated, of another structure, or inconsistent: repeated ids, answers that
            do not stand in their context.
    """
    name = os.fspath(source)
    if name == "embedded":
        examples = _from_official(embedded_squad(split), name)
    elif name.endswith(".json") or Path(name).is_file():
        examples = _from_official(json.loads(Path(name).read_text(encoding="utf-8")), name)
    else:
        check_source(name, "dataset")
        examples = load_dataset(name, split=split)
        if missing := SQUAD_FEATURES.keys() - set(examples.column_names):
            raise ValueError(f"{name} has no column {sorted(missing)}; its columns are {examples.column_names}")
        examples = examples.select_columns(list(SQUAD_FEATURES)).cast(SQUAD_FEATURES)
    _check_examples(examples, name)
    return examples


def _from_official(content: Any, name: str) -> Dataset:
    """Flatten the nested structure of the official files into a row for each question."""
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
    for id_, context, answers in zip(examples["id"], examples["context"], examples["answers"], strict=True):
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            found = context[start : start + len(text)] if start >= 0 else ""
            if not text or found != text:
                raise ValueError(
                    f"{name}: the answer of question {id_!r} is {text!r}, but its context reads {found!r} at {start}; "
                    "set answer_start to the offset of the text in the context, in characters, or leave it out"
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
            token, where the window does not hold all of it. Otherwise add what decoding needs: ``example_id``, and as
            ``offset_mapping`` the first and last character of each token in the context, -1 outside of it.
        num_proc: Processes to spread the work over.

    Returns:
        A row for each window, those of a question in the order of its context.

    Raises:
        ValueError: If the tokenizer pads on the left, or a context holds no token.
    """
    if tokenizer.padding_side != "right":
        raise ValueError(f'windows are padded on the right: set padding_side="right", got {tokenizer.padding_side!r}')
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
    """Return the windows of a batch of questions; see :func:`build_squad_features`."""
    encoded = tokenizer(
        _shortened(batch["question"], tokenizer, options.max_query_length),
        batch["context"],
        truncation="only_second",
        max_length=options.max_seq_length,
        stride=options.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    spans = [
        _context_spans(batch["context"][owner], encoded.sequence_ids(window), offsets[window])
        for window, owner in enumerate(owners)
    ]
    if empty := [batch["id"][owner] for owner, span in zip(owners, spans, strict=True) if span.max() < 0]:
        raise ValueError(f"the context of question {empty[0]!r} holds no token; leave that question out")
    if not train:
        return {**encoded, "example_id": [batch["id"][owner] for owner in owners], "offset_mapping": spans}
    found = [_answer_tokens(span, batch["answers"][owner]) for owner, span in zip(owners, spans, strict=True)]
    starts, ends = zip(*found, strict=True)
    return {**encoded, "start_positions": list(starts), "end_positions": list(ends)}


def _shortened(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_query_length: int) -> list[str]:
    """Return questions without leading white space, cut after their first ``max_query_length`` tokens."""
    stripped = [question.lstrip() for question in questions]
    encoded = tokenizer(
        stripped, add_special_tokens=False, truncation=True, max_length=max_query_length, return_offsets_mapping=True
    )
    ends = [offsets[-1][1] if len(offsets) == max_query_length else None for offsets in encoded["offset_mapping"]]
    return [question[:end] for question, end in zip(stripped, ends, strict=True)]


def _context_spans(
    context: str, sequences: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> NDArray[np.int32]:
    """Return start and end in ``context`` of each token, -1 for the question, white space and tokens of no width."""
    spans = [
        span if sequence == 1 and context[slice(*span)].strip() else (-1, -1)
        for sequence, span in zip(sequences, offsets, strict=True)
    ]
    return np.array(spans, dtype=np.int32)


def _answer_tokens(spans: NDArray[np.int32], answers: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """Return the first and last token of the first answer, or (0, 0) where the window does not hold all of it."""
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
