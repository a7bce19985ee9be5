"""Wikipedia and WikiText-2 as arrays of tokens, encoded once and kept.

The tokenizers, 8,192 word pieces and as many byte-level ones, are trained on the training articles unless they lie in
``tokenizers`` in the data folder. The program prepares everything, so that the trainings of a grid, which begin at
once, only read::

    python -m benchmarks.training.text_data --data gpu_data
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as parquet  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.training.squad_data import Windows, read_windows, squad_windows, write_windows

VOCAB_SIZE = 8192
KINDS = ("wordpiece", "byte_bpe")
SPLITS = {
    "wordpiece": ("train", "validation"),
    "byte_bpe": ("train", "validation", "wikitext2"),
}
_ENCODED_AT_ONCE = 256  # documents


class Tokens(NamedTuple):
    """Documents of a split behind one another, and where each of them begins; the last number is the end of all."""

    ids: NDArray[np.uint16]
    begins: NDArray[np.int64]


@dataclass(frozen=True)
class TextData:
    """Where texts, tokenizers and encoded tokens lie.

    Args:
        data: Folder with ``wikipedia``, ``wikitext2`` and ``squad``.
        cache: Folder of what was encoded; ``encoded`` in the data folder where that can be written to, else
            ``runs/encoded``.
        vocab_size: Of tokenizers that have to be trained.
        max_documents: Take the first so many documents of each split; all unless given.
    """

    data: Path
    cache: Path
    vocab_size: int = VOCAB_SIZE
    max_documents: int | None = None

    @classmethod
    def of(cls, data: Path, cache: Path | None = None, **options: Any) -> TextData:
        """Find the cache folder, unless it is given."""
        if not data.is_dir():
            raise FileNotFoundError(f"--data: no such folder: {data}")
        if cache is None:
            cache = data / "encoded" if os.access(data, os.W_OK) else Path("runs") / "encoded"
        cache.mkdir(parents=True, exist_ok=True)
        return cls(data, cache, **options)

    def tokenizer(self, kind: str) -> Tokenizer:
        """Read the tokenizer of a kind; train it first where there is none."""
        given = self.data / "tokenizers" / f"{kind}.json"
        if given.exists():
            return Tokenizer.from_file(str(given))
        trained = self.cache / f"{kind}-{self.vocab_size}-{self.max_documents or 'all'}.json"
        with _locked(trained):
            if not trained.exists():
                tokenizer = train_tokenizer(kind, self.texts("train"), self.vocab_size)
                partial = trained.with_suffix(".partial")
                tokenizer.save(str(partial))
                partial.replace(trained)
        return Tokenizer.from_file(str(trained))

    def texts(self, split: str) -> list[str]:
        """Read the documents of a split: ``train``, ``validation`` or ``wikitext2``, which is one document."""
        if split == "wikitext2":
            return [(self.data / "wikitext2" / "test.txt").read_text(encoding="utf-8")]
        table = parquet.read_table(self.data / "wikipedia" / f"{split}.parquet", columns=["text"])
        return table.slice(0, self.max_documents)["text"].to_pylist()

    def tokens(self, kind: str, split: str) -> Tokens:
        """Read the tokens of a split; encode it first where that was not done. They are mapped, not read at once."""
        tokenizer = self.tokenizer(kind)
        name = f"{kind}-{split}-{self._mark(tokenizer)}"
        ids, begins = (self.cache / f"{name}.{part}.npy" for part in ("ids", "begins"))
        with _locked(self.cache / name):
            if not begins.exists():
                encoded = encode(tokenizer, self.texts(split))
                _save(ids, encoded.ids)
                _save(begins, encoded.begins)
        return Tokens(np.load(ids, mmap_mode="r"), np.load(begins))

    def squad(self, split: str, max_length: int, stride: int, limit: int | None = None) -> Windows:
        """Read the windows of SQuAD's questions; cut them first where that was not done.

        Args:
            split: ``train`` or ``dev``.
            max_length: Tokens of a window.
            stride: Tokens that a window shares with the next one.
            limit: Take the first so many questions; all unless given.
        """
        source = self.data / "squad" / {"train": "train-partial-v1.1.json", "dev": "dev-v1.1.json"}[split]
        tokenizer = self.tokenizer("wordpiece")
        path = self.cache / f"squad-{split}-{max_length}-{stride}-{limit or 'all'}-{self._mark(tokenizer)}.npz"
        with _locked(path):
            if not path.exists():
                write_windows(path, squad_windows(source, tokenizer, max_length, stride, limit))
        return read_windows(path)

    def _mark(self, tokenizer: Tokenizer) -> str:
        """What tells encodings of other tokenizers or other documents apart."""
        text = f"{tokenizer.to_str()} {self.max_documents} {self.data.resolve()}"
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def train_tokenizer(kind: str, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train word pieces as BERT has them, or byte-level pieces as GPT-2 has them.

    These two functions of hf_fnl import ``datasets``, which a machine that brings its tokenizers need not have.
    """
    from hf_fnl.tasks.tokenization import train_byte_bpe, train_wordpiece

    train = {"wordpiece": train_wordpiece, "byte_bpe": train_byte_bpe}[kind]
    trained: Any = train(texts, vocab_size=vocab_size)
    return trained.backend_tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Tokens:
    """Encode documents without special tokens; those of a byte-level tokenizer begin with ``<|endoftext|>``."""
    tokenizer.no_truncation()
    first = tokenizer.token_to_id("<|endoftext|>")
    head = np.array([] if first is None else [first], dtype=np.uint16)
    parts, lengths = [], []
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        chunk = list(texts[start : start + _ENCODED_AT_ONCE])
        for encoding in tokenizer.encode_batch_fast(chunk, add_special_tokens=False):
            parts += [head, np.array(encoding.ids, dtype=np.uint16)]
            lengths.append(len(head) + len(parts[-1]))
    return Tokens(np.concatenate(parts), np.cumsum([0, *lengths]))


def _save(path: Path, array: NDArray[Any]) -> None:
    """Write an array; it appears whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.save(file, array)
    partial.replace(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time in, of those that ask for the same path."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(data: TextData) -> None:
    """Encode everything that the trainings of the grids read, and say how large it is."""
    for kind in KINDS:
        for split in SPLITS[kind]:
            began = time.perf_counter()
            tokens = data.tokens(kind, split)
            seconds = time.perf_counter() - began
            print(
                f"{kind} {split}: {len(tokens.ids):,} tokens, {len(tokens.begins) - 1} documents, {seconds:.1f} s",
                flush=True,
            )
    for split in ("train", "dev"):
        began = time.perf_counter()
        windows = data.squad(split, 384, 128)
        print(f"squad {split}: {len(windows.ids):,} windows, {time.perf_counter() - began:.1f} s", flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prepare the texts of a data folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--cache", type=Path, help="where encoded tokens go; 'encoded' in the data folder if it can be")
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # read when texts are encoded
    prepare(TextData.of(options.data, options.cache))


if __name__ == "__main__":
    main()
