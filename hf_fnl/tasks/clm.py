"""Blocks of tokens for causal language modelling, cut from documents that follow each other without a gap.

The tokens of all documents make one stream, with an end-of-text token before each document and after the last. Windows
over the stream are the examples. A window's first token is the last one of the window before, or more are shared where
the stride is smaller; a token is a label only in the first window that predicts it. So every token of the text is
predicted exactly once in a pass, and neither batches nor processes nor the end of the corpus lose any. Of a corpus that
is read while training every group of documents makes such a stream of tokens. As in GPT-2's training, positions count
from a window's start, and attention does not stop at the end of a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX

MIN_BLOCK_SIZE = 2
DOCUMENTS_PER_GROUP = 1000  # of a stream, which are in memory together
NO_TEXT = "no document with text to make blocks of"

_TOKENS = datasets.Features({"tokens": datasets.List(datasets.Value("int32")), "words": datasets.Value("int32")})


def encode_documents(batch: Mapping[str, Sequence[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Encode the column ``text``, an end-of-text token behind each document; those of white space alone are left out.

    Returns:
        ``tokens``, the ids of each document, and ``words``, how many words it has that white space separates.
    """
    texts = [text for text in batch["text"] if text and not text.isspace()]
    if not texts:
        return {"tokens": [], "words": []}
    only_ids = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    documents = tokenizer(texts, verbose=False, **only_ids)["input_ids"]
    return {
        "tokens": [[*ids, tokenizer.eos_token_id] for ids in documents],
        "words": [len(text.split()) for text in texts],
    }


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How windows lie on a stream of tokens.

    Attributes:
        end_of_text: Id that begins the stream and fills up the last window.
        block_size: Tokens of a window.
        stride: Tokens by which a window is ahead of the one before, below ``block_size``.
    """

    end_of_text: int
    block_size: int
    stride: int

    def __post_init__(self) -> None:
        if self.block_size < MIN_BLOCK_SIZE:
            raise ValueError(f"block_size must be at least {MIN_BLOCK_SIZE}, got {self.block_size}")
        if not 1 <= self.stride < self.block_size:
            raise ValueError(
                f"stride must be at least 1 and below block_size, which is {self.block_size}; got {self.stride}"
            )

    def known(self, index: int) -> int:
        """Tokens at the start of a window that are no labels: earlier windows predict them, or nothing can."""
        return 1 if index == 0 else self.block_size - self.stride

    def count(self, num_tokens: int) -> int:
        """Windows over a stream, its first token counted in."""
        return 1 + -(-max(0, num_tokens - self.block_size) // self.stride)

    def example(self, tokens: NDArray[np.int32], index: int) -> dict[str, Tensor]:
        """Make an example of a window's tokens; what fills it up stands where causal attention does not look."""
        input_ids = torch.full((self.block_size,), self.end_of_text)
        input_ids[: len(tokens)] = torch.from_numpy(tokens)
        labels = input_ids.clone()
        labels[: self.known(index)] = IGNORE_INDEX
        labels[len(tokens) :] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}


class BlockDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows over documents that lie in an Arrow file; only the one that is asked for is read.

    Args:
        documents: What :func:`encode_documents` returns, a document a row.
        windows: How windows lie on the stream.
    """

    def __init__(self, documents: datasets.Dataset, windows: Windows) -> None:
        self.documents, self.windows = documents, windows
        # Views of the file: flat token ids of some thousand documents each.
        stored = [chunk.flatten().to_numpy() for chunk in documents.data.column("tokens").chunks]
        self._parts = [np.array([windows.end_of_text], dtype=np.int32), *stored]
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.num_tokens = int(self._starts[-1]) - 1  # that are predicted, so without the first of the stream
        self.num_words = int(np.sum(documents.with_format("numpy")["words"][:]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.documents, self.windows)

    def __len__(self) -> int:
        return self.windows.count(self.num_tokens + 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]
        start = index * self.windows.stride
        stop = min(start + self.windows.block_size, self.num_tokens + 1)
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        parts = zip(self._starts[first : last + 1], self._parts[first : last + 1], strict=True)
        pieces = [part[max(start - begin, 0) : stop - begin] for begin, part in parts]
        return self.windows.example(np.concatenate(pieces), index)


def _windows_of(
    batch: Mapping[str, Sequence[str | None]], tokenizer: PreTrainedTokenizerBase, windows: Windows
) -> dict[str, list[Tensor]]:
    """Make the windows over the documents of a batch, a stream of tokens of their own."""
    documents = encode_documents(batch, tokenizer)["tokens"]
    tokens = np.fromiter(chain([windows.end_of_text], *documents), dtype=np.int32)
    starts = range(0, windows.count(len(tokens)) * windows.stride, windows.stride) if documents else ()
    examples = [windows.example(tokens[s : s + windows.block_size], number) for number, s in enumerate(starts)]
    return {name: [example[name] for example in examples] for name in ("input_ids", "labels")}


def build_blocks(
    documents: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    stride: int | None = None,
    num_proc: int | None = None,
) -> BlockDataset | datasets.IterableDataset:
    """Turn documents into examples for a data loader or a Trainer, all of one length.

    Args:
        documents: Column ``text``, one document a row. A map-style data set is encoded once, into Arrow files that
            ``datasets`` caches; an iterable one as it is read, a group of documents at a time.
        tokenizer: Tokenizer with an end-of-text token, such as GPT-2's.
        block_size: Tokens of an example.
        stride: Tokens by which an example is ahead of the one before. Default: ``block_size - 1``, each token once.
        num_proc: Processes that encode a map-style data set; the examples do not depend on it.

    Returns:
        A data set of dictionaries with ``input_ids`` and ``labels`` (-100 where nothing is predicted), both of shape
        ``(block_size,)`` and not shifted against each other.

    Raises:
        ValueError: If there is no column ``text`` or no text, the tokenizer has no end-of-text token, or a size is out
            of range.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which separates documents")
    stride = block_size - 1 if stride is None else stride
    windows = Windows(end_of_text=tokenizer.eos_token_id, block_size=block_size, stride=stride)
    first = next(iter(documents), None)
    if first is None:
        raise ValueError(NO_TEXT)
    if "text" not in first:
        raise ValueError(f"the documents need a column 'text', they have {sorted(first)}")
    if isinstance(documents, datasets.IterableDataset):
        options = {"tokenizer": tokenizer, "windows": windows}
        return documents.map(
            _windows_of, fn_kwargs=options, batched=True, batch_size=DOCUMENTS_PER_GROUP, remove_columns=[*first]
        )
    encoded = documents.map(
        encode_documents,
        fn_kwargs={"tokenizer": tokenizer},
        batched=True,
        features=_TOKENS,
        remove_columns=documents.column_names,
        num_proc=num_proc,
        desc="Encoding documents",
    )
    if len(encoded) == 0:
        raise ValueError(NO_TEXT)
    return BlockDataset(encoded, windows)
