"""Raw documents as a ``datasets`` data set with the one column ``text``."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.training.command_line import check_at_least, named
from hf_fnl.utils.hub import check_source
from hf_fnl.utils.processes import gather, raise_on_all

SUFFIXES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}
COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst"}
# The words by which `datasets` tells a split from a file's name.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}

FEW_SHARDS = 8  # fewer files of a stream than these are divided further
# Over a stream; a finite number, so that a stream in which nothing is found ends.
PASSES = 1000
_BLANK_LINES = re.compile(r"\n\s*\n")


def load_documents(
    source: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    name: str | None = None,
    text_column: str = "text",
    streaming: bool = False,
    limit: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Load raw documents, one a row, from wherever they lie.

    Text files hold documents as BERT's pretraining input does: a blank line ends a document, and a line break inside
    one ends a sentence. In parquet and JSON files and on the Hub a row is a document.

    Args:
        source: A data set id on the Hub; a file (``.parquet``, ``.json``, ``.jsonl`` or ``.txt``, also compressed); a
            list of such files, all of one kind; a folder of them; or ``"embedded"`` for the corpus inside CPython.
        split: Split to load. In a folder it is the files that have ``train``, ``validation``, ``test`` or a word like
            these in their names; where none has, all are the train split. Other files are whatever split is asked for.
        name: Configuration of a Hub data set that has several.
        text_column: Column that holds the text.
        streaming: Read while training instead of beforehand; memory and disk use do not grow with the corpus.
        limit: Take this many documents at most: the first ones, of a stream those of each worker's share.

    Returns:
        A data set with the single column ``text``; an iterable one when ``streaming``, whose shards are files or, where
        these are few, row groups of parquet files.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a file cannot be read, the files are of several kinds or of none that is known, the data set is
            empty, ``text_column`` is not in it or holds no text, or ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 document or None for all, got {limit}")
    if source == "embedded":
        documents: Any = datasets.Dataset.from_dict({"text": embedded_documents()})
        documents = documents.to_iterable_dataset() if streaming else documents
    elif isinstance(source, str) and not looks_like_path(source):
        check_source(source, "dataset")
        documents = datasets.load_dataset(source, name, split=split, streaming=streaming)
    else:
        paths = [source] if isinstance(source, str | Path) else source
        files = data_files([Path(path).expanduser() for path in paths], split)
        kind = common_kind(files)
        options = {"sample_by": "paragraph", "encoding": "utf-8-sig"} if kind == "text" else {}
        documents = read_files(kind, files, split, streaming=streaming, **options)
        if kind == "text":
            documents = documents.map(_split_at_blank_lines, batched=True)
    _check_first(next(iter(documents), None), text_column, source)
    documents = documents.select_columns([text_column])
    if text_column != "text":
        documents = documents.rename_column(text_column, "text")
    if limit is not None:
        return documents.take(limit if streaming else min(limit, len(documents)))
    return documents.reshard() if streaming and documents.num_shards < FEW_SHARDS else documents


@dataclass
class DocumentOptions:
    """Options of a script for the documents to train and to evaluate on."""

    dataset: str = field(
        default="embedded",
        metadata={"help": "Hub id, file, folder, or embedded; blank lines part the documents of a text file."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_dataset: str | None = field(default=None, metadata={"help": "Hub id, file or folder to evaluate on."})
    validation_split: str = field(default="train", metadata={"help": "Split of validation_dataset."})
    max_validation_documents: int | None = field(default=None, metadata={"help": "Take the first so many documents."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    max_documents: int | None = field(default=None, metadata={"help": "Take the first so many documents."})
    streaming: bool = field(default=False, metadata={"help": "Read while training; memory does not grow."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub id or folder. Default: train one."})

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_documents", "max_validation_documents", "num_proc")

    def training(self, *, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
        """The documents to train on; all of them at once unless ``streaming``, and then over and over again.

        All processes call this together.
        """
        source: dict[str, Any] = {
            "source": self.dataset,
            "split": self.split,
            "name": self.dataset_config,
            "text_column": self.text_column,
            "limit": self.max_documents,
        }
        with named("dataset", self.dataset):
            if looks_like_path(self.dataset):
                check_same_files(raise_on_all(lambda: data_files([Path(self.dataset).expanduser()], self.split)))
            if not streaming:
                return raise_on_all(lambda: load_documents(**source))
            documents = raise_on_all(lambda: load_documents(streaming=True, **source))
            return documents.repeat(PASSES)

    def validation(self) -> datasets.Dataset | None:
        """The documents to evaluate on, if any."""
        if (source := self.validation_dataset) is None:
            return None
        with named("validation_dataset", source):
            return raise_on_all(
                lambda: load_documents(
                    source,
                    split=self.validation_split,
                    text_column=self.text_column,
                    limit=self.max_validation_documents,
                )
            )


def looks_like_path(source: str) -> bool:
    """Whether a name means a local file or folder: it exists, or no Hub id can be written so."""
    path = Path(source)
    return path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1 or _kind(path) is not None


def read_files(kind: str, files: Sequence[Path] | None, split: str, **options: Any) -> Any:
    """Load a split from files of a kind of ``datasets``, or without files from the folder ``kind``.

    Raises:
        ValueError: If they cannot be read.
    """
    # `datasets` takes file names for patterns.
    names = files and {split.partition("[")[0]: [glob.escape(str(file)) for file in files]}
    try:
        found = datasets.load_dataset(kind, data_files=names, split=split, **options)
        next(iter(found), None)  # of a stream this is the first look into a file
        return found
    except Exception as error:
        shown = [kind] if files is None else [*map(str, files[:3]), *(["..."] if len(files) > 3 else [])]
        what = "" if files is None else f" as {kind}"
        raise ValueError(
            f"cannot read the {split} split of {', '.join(shown)}{what}: {error.__cause__ or error}"
        ) from error


def data_files(paths: Sequence[Path], split: str) -> list[Path]:
    """The files of a split among files and folders, as :func:`load_documents` finds them.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If there is none, or one is empty.
    """
    if not paths:
        raise ValueError("the list of data files is empty")
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no such file or folder: {', '.join(missing)}")
    files = [file for path in paths for file in (_files_of_split(path, split) if path.is_dir() else [path])]
    if empty := [str(file) for file in files if file.stat().st_size == 0]:
        raise ValueError(f"empty data file: {', '.join(empty)}")
    return files


def check_same_files(files: Sequence[Path]) -> None:
    """Raise a ``ValueError`` that names a file which is not the same on all processes, who call this together."""
    first, *others = gather({str(file): file.stat().st_size for file in files})
    for rank, here in enumerate(others, start=1):
        for name in sorted({**first, **here}):
            sizes = [f"{seen[name]} bytes" if name in seen else "not there" for seen in (first, here)]
            if sizes[0] != sizes[1]:
                raise ValueError(f"data file {name}: {sizes[0]} in process 0, {sizes[1]} in process {rank}")


def _files_of_split(folder: Path, split: str) -> list[Path]:
    names = sorted(file.relative_to(folder) for file in folder.rglob("[!.]*") if _kind(file))
    if not names:
        raise ValueError(f"no data file in {folder}; {_allowed()}")
    words = {name: set(re.split("[^a-z]+", str(name).lower())) for name in names}
    split = split.partition("[")[0]
    wanted = SPLIT_WORDS.get(split, {split})
    chosen = [name for name in names if words[name] & wanted]
    if not chosen and split == "train" and not any(words[name] & set().union(*SPLIT_WORDS.values()) for name in names):
        chosen = names
    if not chosen:
        raise ValueError(f"no {split} split in {folder}: none of {sorted(wanted)} in {[str(name) for name in names]}")
    return [folder / name for name in chosen]


def common_kind(files: Sequence[Path]) -> str:
    """The kind of all files, ``"text"``, ``"json"`` or ``"parquet"``, or a ``ValueError``."""
    kinds = {_kind(file) for file in files}
    if None in kinds:
        unknown = next(file for file in files if _kind(file) is None)
        raise ValueError(f"unknown kind of data file: {unknown}; {_allowed()}")
    if len(kinds) > 1:
        raise ValueError(f"data files of one kind are needed, got {sorted(map(str, kinds))} in {files[0].parent}")
    return str(kinds.pop())


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _allowed() -> str:
    return f"allowed are {', '.join(SUFFIXES)}, also compressed ({', '.join(sorted(COMPRESSIONS))})"


def _split_at_blank_lines(batch: dict[str, list[str]]) -> dict[str, list[str]]:
    # The text reader splits at "\n\n" only; BERT's format also lets a separating line hold spaces.
    pieces = (piece.strip() for text in batch["text"] for piece in _BLANK_LINES.split(text))
    return {"text": [piece for piece in pieces if piece]}


def _check_first(first: dict[str, Any] | None, text_column: str, source: object) -> None:
    if first is None:
        raise ValueError(f"no documents in {source}")
    if text_column not in first:
        raise ValueError(f"no column {text_column!r} in {source}; set text_column to one of {sorted(first)}")
    if not isinstance(first[text_column], str | None):
        kind = type(first[text_column]).__name__
        raise ValueError(f"column {text_column!r} of {source} holds {kind}, not text; set text_column to one that does")
