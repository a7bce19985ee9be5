"""Sentence pairs for translation, as text with the columns ``source`` and ``target``, and as token ids."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_fnl.tasks.documents import SPLIT_WORDS, SUFFIXES, looks_like_path, read_files
from hf_fnl.tasks.length_batches import lengths_of
from hf_fnl.tasks.phrases import embedded_phrases
from hf_fnl.utils.hub import check_source

logger = logging.getLogger(__name__)

COLUMNS = ("source", "target")


def load_pairs(
    source: str | Path | Sequence[str | Path],
    *,
    languages: tuple[str, str] = ("de", "en"),
    split: str = "train",
    name: str | None = None,
    drop_empty: bool = False,
    limit: int | None = None,
) -> datasets.Dataset:
    """Load sentence pairs from wherever they lie; white space around a sentence is cut off.

    Args:
        source: A data set id on the Hub; a ``.parquet``, ``.json`` or ``.jsonl`` file; two text files with one sentence
            a line, source before target; a folder of such files; or ``"embedded"`` for phrases made here.
        languages: Source and target: keys of the records in a column ``translation``, or columns of their own; in a
            folder of text files, what the names end in, as ``train.de``.
        split: Split to load. In a folder of text files the names hold it, or a word like ``valid``. Other files are
            whatever split is asked for.
        name: Configuration of a Hub data set that has several.
        drop_empty: Leave out pairs with an empty side instead of refusing them.
        limit: Take this many pairs at most, the first ones.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file cannot be read, text files are of unequal length, a language is not in the data, a side of
            a pair is empty, there are no pairs, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 pair or None for all, got {limit}")
    paths = [source] if isinstance(source, str | Path) else list(source)
    if paths == ["embedded"]:
        pairs = datasets.Dataset.from_dict(embedded_phrases(split, languages=languages))
    elif len(paths) == 1 and isinstance(paths[0], str) and not looks_like_path(paths[0]):
        check_source(paths[0], "dataset")
        pairs = _two_columns(datasets.load_dataset(paths[0], name, split=split), languages, paths[0])
    else:
        pairs = _read_paths([Path(path).expanduser() for path in paths], languages, split)
    if limit is not None:
        pairs = pairs.take(min(limit, len(pairs)))
    pairs = pairs.map(_strip, batched=True, desc="Reading pairs")
    sides = zip(*(pairs[name] for name in COLUMNS), strict=True)
    full = np.array([bool(source and target) for source, target in sides], dtype=bool)
    if not full.all() and not drop_empty:
        raise ValueError(
            f"{(~full).sum()} of {len(full)} pairs of {' and '.join(map(str, paths))} have an empty side, the first in "
            f"line {full.argmin() + 1}; set drop_empty to leave them out"
        )
    if not full.any():
        raise ValueError(f"no sentence pairs in {' and '.join(map(str, paths))}")
    return pairs if full.all() else pairs.select(np.flatnonzero(full))


def _read_paths(paths: Sequence[Path], languages: tuple[str, str], split: str) -> datasets.Dataset:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    if len(paths) == 2:
        return _parallel_files(paths)
    if len(paths) != 1:
        raise ValueError(f"give one folder or file of pairs, or two text files of equal length; got {len(paths)} paths")
    (path,) = paths
    if path.is_dir():
        text_files = [sorted(path.glob(f"*.{language}")) for language in languages]
        if any(text_files):
            return _parallel_files(
                [_of_split(files, path, split, language) for files, language in zip(text_files, languages, strict=True)]
            )
        return _two_columns(read_files(str(path), None, split), languages, path)
    kind = SUFFIXES.get(path.suffix)
    if kind in (None, "text"):
        raise ValueError(
            f"{path} is no file of pairs: give a .parquet, .json or .jsonl file, or two text files, source first"
        )
    return _two_columns(read_files(kind, [path], split), languages, path)


def _of_split(files: Sequence[Path], folder: Path, split: str, language: str) -> Path:
    """Return the one file of a language and a split."""
    wanted = SPLIT_WORDS.get(split, {split})
    chosen = [file for file in files if wanted & set(re.split("[^a-z]+", file.stem.lower()))]
    if len(chosen) != 1:
        raise ValueError(
            f"one {split} file of language {language!r} is needed in {folder}, with one of {sorted(wanted)} in its "
            f"name and ending in .{language}; found {[file.name for file in chosen]} among "
            f"{sorted(file.name for file in folder.iterdir())}"
        )
    return chosen[0]


def _parallel_files(files: Sequence[Path]) -> datasets.Dataset:
    lines = [lines_of(file.read_bytes(), str(file)) for file in files]
    if len(lines[0]) != len(lines[1]):
        raise ValueError(
            f"parallel files must have equally many lines: {files[0]} has {len(lines[0])}, {files[1]} has "
            f"{len(lines[1])}"
        )
    return datasets.Dataset.from_dict(dict(zip(COLUMNS, lines, strict=True)))


def lines_of(content: bytes, name: str) -> list[str]:
    """Return the lines of a UTF-8 text, which end in a line feed, with or without a carriage return.

    Sentences of a corpus may hold a lone carriage return, U+2028 and others, at which other ways of reading would
    break a line and put all that follow beside the wrong translations. A byte order mark is no part of the first line.

    Args:
        content: The text.
        name: What holds it, for errors.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name}, line {line}, is not UTF-8 text: {error}") from error
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _two_columns(pairs: datasets.Dataset, languages: tuple[str, str], source: object) -> datasets.Dataset:
    """Return the two languages of a data set as the columns ``source`` and ``target``."""
    if "translation" in pairs.column_names:
        pairs = pairs.select_columns(["translation"]).flatten()
        found = {column.removeprefix("translation."): column for column in pairs.column_names}
    else:
        found = {column: column for column in pairs.column_names}
    absent = [language for language in languages if language not in found]
    if absent:
        raise ValueError(
            f"no {' and no '.join(map(repr, absent))} in {source}: set the languages to two of {sorted(found)}"
        )
    chosen = [found[language] for language in languages]
    for column in chosen:
        if not isinstance(pairs.features[column], datasets.Value) or pairs.features[column].dtype != "string":
            raise ValueError(f"column {column!r} of {source} holds {pairs.features[column]}, not text")
    return pairs.select_columns(chosen).rename_columns(dict(zip(chosen, COLUMNS, strict=True)))


def _strip(batch: dict[str, list[str | None]]) -> dict[str, Any]:
    return {column: [(sentence or "").strip() for sentence in batch[column]] for column in COLUMNS}


def encode_pairs(
    pairs: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    longest: int | float,
    max_length: int | None = None,
    drop_long: bool = False,
) -> datasets.Dataset:
    """Turn sentence pairs into token ids.

    Args:
        pairs: Columns ``source`` and ``target``.
        tokenizer: Encodes both; ends them as its model needs.
        longest: Tokens that a side may have: what a batch or the model's positions hold.
        max_length: Cut every side to this many tokens first, the end of the sentence kept as an end.
        drop_long: Leave out pairs with a longer side, and log how many, instead of refusing them.

    Returns:
        Columns ``input_ids`` and ``labels``, in the order of ``pairs``.

    Raises:
        ValueError: If a side is longer than ``longest``, no pair is left, or ``max_length`` is below 2.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, a token and the end, or None for no cut, got {max_length}")
    cut = {"truncation": max_length is not None, "max_length": max_length}

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        source = tokenizer(batch["source"], verbose=False, **cut)
        target = tokenizer(text_target=batch["target"], verbose=False, **cut)
        return {"input_ids": source["input_ids"], "labels": target["input_ids"]}

    encoded = pairs.map(encode, batched=True, remove_columns=pairs.column_names, desc="Encoding pairs")
    lengths = lengths_of(encoded)
    long = lengths.max(axis=1) > longest
    if not long.any():
        return encoded
    if not drop_long:
        row = int(long.argmax())
        side = int(lengths[row].argmax())
        raise ValueError(
            f"{long.sum()} of {len(pairs)} pairs have more than {longest} tokens on a side, first pair {row + 1}: "
            f"{COLUMNS[side]} {pairs[row][COLUMNS[side]][:60]!r}... has {lengths[row, side]}; raise max_tokens (and "
            "max_position_embeddings), cut with max_length, or leave them out with drop_long"
        )
    if long.all():
        raise ValueError(f"all {len(pairs)} pairs have more than {longest} tokens on a side; raise max_tokens")
    logger.warning("left out %d of %d pairs with more than %d tokens on a side", long.sum(), len(pairs), longest)
    return encoded.select(np.flatnonzero(~long))
