"""Texts to calibrate with: as many samples as asked for, cut from documents that are read as far as needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import fsspec  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from hf_fnl.tasks.documents import common_kind, data_files, load_documents, looks_like_path
from hf_fnl.tasks.tokenization import load_tokenizer

_CHARACTERS = 16  # of a token, at most: what is kept of a document is enough for all samples
_BATCH = 1024  # tokens that run through the model at once


@dataclass(frozen=True)
class Texts:
    """Text to calibrate with.

    Args:
        source: File, folder or Hub id; see :func:`~hf_fnl.tasks.documents.load_documents`.
        column: Column that holds the text.
        samples: Samples that are cut from it: the first of each document, then the second ones, and so on.
        length: Tokens of a sample, at most as many as the model reads. The end of a document may be shorter; for a
            causal language model short documents are joined with those that follow. A text file is one document.
    """

    source: str
    column: str
    samples: int
    length: int

    def documents(self) -> Iterator[str]:
        """The first documents, as many as fill all samples, of each up to what one alone would be read for.

        Raises:
            FileNotFoundError: If there is no such file, folder or data set.
            ValueError: If a file cannot be read as text.
        """
        longest, found = self.samples * self._size, 0
        for text in self._documents(longest):
            yield text[:longest]
            found += longest if len(text) >= longest else min(len(text), self._size)
            if found >= longest:
                return

    @property
    def _size(self) -> int:
        """Characters that are enough for a sample."""
        return self.length * _CHARACTERS

    def joined(self, documents: Iterable[str]) -> Iterator[str]:
        """Documents, short ones with those that follow, so that each fills a sample."""
        held, size = list[str](), 0
        for text in documents:
            held.append(text)
            size += len(text)
            if size >= self._size:
                yield "\n\n".join(held)
                held, size = [], 0
        if held:
            yield "\n\n".join(held)

    def _documents(self, longest: int) -> Iterator[str]:
        if looks_like_path(self.source):
            files = data_files([Path(self.source).expanduser()], "train")
            if common_kind(files) == "text":
                yield from filter(None, (_beginning(file, longest).strip() for file in files))
                return
        rows = load_documents(self.source, text_column=self.column, streaming=True)
        for text in (row["text"] for row in rows):
            if not isinstance(text, str | NoneType):
                raise ValueError(f"column {self.column!r} of {self.source} holds {text!r}, which is no text")
            if text and text.strip():
                yield text


Read = tuple[PreTrainedTokenizerBase, list[str]]


def read_texts(tokenizer_source: str, texts: Texts) -> Read:
    """The tokenizer and the documents, before a model is loaded.

    Raises:
        FileNotFoundError: If the file or the tokenizer is missing.
        ValueError: If there is no text, or the tokenizer needs code of its own.
    """
    documents = list(texts.documents())
    if not documents:
        raise ValueError(f"no text in {texts.source}")
    return load_tokenizer(tokenizer_source), documents


def calibration_batches(model: PreTrainedModel, read: Read, texts: Texts) -> list[dict[str, Tensor]]:
    """Batches of text for a model, each of samples of one length: there is no padding.

    For a causal language model they hold labels, whose loss then tells what counts.

    Args:
        model: The model.
        read: What :func:`read_texts` read for it.
        texts: Says how many samples are cut, and how long.

    Raises:
        ValueError: If the model reads no text, or the tokenizer is not the model's or finds no token in the texts.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(f"--calibrate needs a model of text; a {type(model).__name__} reads {model.main_input_name}")
    tokenizer, documents = read
    predicts_next = isinstance(model, GenerationMixin) and not model.config.is_encoder_decoder
    if predicts_next:
        documents = list(texts.joined(documents))
    length = min(tokenizer.model_max_length, longest_input(model, texts.length))
    samples = list(itertools.islice(_samples(tokenizer, documents, length), texts.samples))
    if not samples:
        raise ValueError(f"the tokenizer finds no token in {texts.source}")
    largest, known = max(map(max, samples)), model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise ValueError(
            f"the tokenizer in {tokenizer.name_or_path} is not that of the model, which knows {known:,} tokens: it "
            f"gives the token {largest}"
        )
    by_length: dict[int, list[list[int]]] = {}
    for ids in samples:
        by_length.setdefault(len(ids), []).append(ids)
    rows = [part for ids in by_length.values() for part in torch.tensor(ids).split(max(1, _BATCH // len(ids[0])))]
    return [text_inputs(model, part, **({"labels": part} if predicts_next else {})) for part in rows]


def text_inputs(model: PreTrainedModel, ids: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """Return the inputs of a model that reads a text; one with an encoder and a decoder reads it on both sides."""
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **both, **more}


def longest_input(model: PreTrainedModel, length: int) -> int:
    """This length, or the longest that the model has positions for; None and -1 mean that any is."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(length, positions) if positions is not None and positions > 0 else length


def _beginning(file: Path, longest: int) -> str:
    """The first characters of a text file."""
    try:
        with fsspec.open(file, "rt", encoding="utf-8-sig", compression="infer") as opened:
            return str(opened.read(longest))
    except UnicodeDecodeError as error:
        wrong = error.object[error.start : error.end]
        raise ValueError(f"{file} is no text in UTF-8, it holds {wrong!r}: {error.reason}") from error
    except (EOFError, OSError, ImportError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error


def _samples(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Iterator[list[int]]:
    """Token ids of the first sample of each text, then of the second ones, and so on; with special tokens."""
    before, after = _special_tokens(tokenizer, texts)
    room = length - len(before) - len(after)
    if room < 1:
        raise ValueError(
            f"--calibration-length {length} has no room for text beside {len(before + after)} special tokens"
        )
    pending = [_pieces(tokenizer, text, room) for text in texts]
    while pending:
        left = []
        for pieces in pending:
            if (ids := next(pieces, None)) is not None:
                yield before + ids + after
                left.append(pieces)
        pending = left


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, room: int) -> Iterator[list[int]]:
    """Token ids of a text, so many at a time; it is tokenized in slices, as far as ids are asked for."""
    ids: list[int] = []
    start, slice_size = 0, max(_CHARACTERS * room, 256)
    while start < len(text):
        end = start + slice_size
        if end < len(text):  # between two words, where there are some
            end = next((i for i in range(end, start + slice_size // 2, -1) if text[i].isspace()), end)
        ids += _ids(tokenizer, text[start:end])
        start = end
        while len(ids) >= room:
            yield ids[:room]
            ids = ids[room:]
    if ids:
        yield ids


def _special_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before a text, and after it."""
    for text in texts:
        word = text.split()[0][:64]
        if bare := _ids(tokenizer, word):
            full = tokenizer(word, verbose=False)["input_ids"]
            start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
            return ([], []) if start is None else (full[:start], full[start + len(bare) :])
    return [], []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(found)
