"""Blocks of tokens for causal language modelling, cut from documents that follow each other without a gap.

The tokens of all documents make one stream, with an end-of-text token before each document and after the last. Windows
over the stream are the examples. A window's first token is the last one of the window before, or more are shared where
the stride is smaller; a token is a label only in the first window that predicts it. So every token of the text is
predicted exactly once in a pass, and neither batches nor processes nor the end of the corpus lose any. A corpus that is
read while training makes such a stream of tokens of each of its shards. As in GPT-2's training, positions count from a
window's start, and attention does not stop at the end of a document.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.tasks.document_shards import DocumentShards
from hf_fnl.training.streaming import Example, ShardedStream

MIN_BLOCK_SIZE = 2
NO_TEXT = "no document with text to make blocks of"

_TOKENS = datasets.Features({"tokens": datasets.List(datasets.Value("int32")), "words": datasets.Value("int32")})


def encode_documents(batch: Mapping[str, Sequence[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list]:
    """Encode documents, each with an end-of-text token behind it; those of white space alone are left out.

    Args:
        batch: Column ``text``.
        tokenizer: Tokenizer with an end-of-text token.

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
        beyond_the_first = max(0, self.num_tokens + 1 - self.windows.block_size)
        return 1 + -(-beyond_the_first // self.windows.stride)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        index = range(len(self))[index]
        start = index * self.windows.stride
        stop = min(start + self.windows.block_size, self.num_tokens + 1)
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        parts = zip(self._starts[first : last + 1], self._parts[first : last + 1], strict=True)
        pieces = [part[max(start - begin, 0) : stop - begin] for begin, part in parts]
        return self.windows.example(np.concatenate(pieces), index)


class StreamingBlocks(ShardedStream):
    """Windows over documents that are read in the meantime, each shard a stream of tokens of its own.

    The documents of one window are in memory at a time. A place is a document, the first of its tokens that the next
    window has, and the number of this window; so a run goes on without what it had read and not used up.

    Args:
        documents: Their shards are those of the stream.
        tokenizer: Tokenizer with an end-of-text token.
        windows: How windows lie on the stream of a shard.
        seed: Seed of the order of shards.
    """

    start = (0, 0, 0)

    def __init__(
        self, documents: DocumentShards, tokenizer: PreTrainedTokenizerBase, windows: Windows, seed: int = 42
    ) -> None:
        super().__init__()
        self.documents, self.tokenizer, self.windows = documents, tokenizer, windows
        self.num_shards, self.seed = documents.num_shards, seed

    def identity(self) -> dict[str, Any]:
        """What gives places their meaning."""
        sizes = {"block_size": self.windows.block_size, "stride": self.windows.stride}
        return {**self.documents.identity(), "seed": self.seed, **sizes, "vocab_size": len(self.tokenizer)}

    def files(self) -> dict[str, int]:
        """The local files that are read, with their sizes in bytes."""
        return self.documents.files()

    def read(self, shard: int, epoch: int, place: Sequence[int]) -> Iterator[tuple[Example, tuple[int, ...]]]:
        """Cut the windows of a shard from a place on."""
        document, offset, index = place
        pending = Pending(document, offset)
        for number, text in enumerate(self.documents.texts(shard, epoch=epoch, start=document), start=document):
            pending.add(self._tokens(number, text))
            while len(pending.tokens) >= self.windows.block_size:
                yield self._take(pending, index)
                index += 1
        while len(pending.tokens) > self.windows.known(index):
            yield self._take(pending, index)
            index += 1

    def _tokens(self, number: int, text: str | None) -> list[int]:
        encoded = encode_documents({"text": [text]}, self.tokenizer)["tokens"]
        begin = [self.windows.end_of_text] if number == 0 else []
        return begin + list(chain.from_iterable(encoded))

    def _take(self, pending: Pending, index: int) -> tuple[Example, tuple[int, ...]]:
        example = self.windows.example(pending.tokens[: self.windows.block_size], index)
        return example, (*pending.drop(self.windows.stride), index + 1)

    def __iter__(self) -> Iterator[Example]:
        example = None
        for example in super().__iter__():
            yield example
        if example is None and get_worker_info() is None:
            raise ValueError(NO_TEXT)


class Pending:
    """Tokens that were read and not used up, and where they stand.

    Args:
        document: Number of the document that is added first.
        offset: Its tokens that were used up before.
    """

    def __init__(self, document: int, offset: int) -> None:
        self.tokens = np.array([], dtype=np.int32)
        self._document, self._offset = document, offset
        self._to_drop = offset
        self._lengths: deque[int] = deque()

    def add(self, tokens: Sequence[int]) -> None:
        """Append the tokens of the next document."""
        self._lengths.append(len(tokens))
        self.tokens = np.concatenate([self.tokens, np.array(tokens[self._to_drop :], dtype=np.int32)])
        self._to_drop = max(0, self._to_drop - len(tokens))

    def drop(self, count: int) -> tuple[int, int]:
        """Use up the first ``count`` tokens; returns the document and the token in it where the others begin."""
        self.tokens = self.tokens[count:]
        self._offset += count
        while self._lengths and self._offset >= self._lengths[0]:
            self._offset -= self._lengths.popleft()
            self._document += 1
        return self._document, self._offset


def build_blocks(
    documents: datasets.Dataset | datasets.IterableDataset | DocumentShards,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    stride: int | None = None,
    num_proc: int | None = None,
    seed: int = 42,
) -> BlockDataset | StreamingBlocks:
    """Turn documents into examples for a data loader or a Trainer, all of one length.

    Args:
        documents: Column ``text``, one document a row. A map-style data set is encoded once, into Arrow files that
            ``datasets`` caches; an iterable one, or one in shards, as it is read.
        tokenizer: Tokenizer with an end-of-text token, such as GPT-2's.
        block_size: Tokens of an example.
        stride: Tokens by which an example is ahead of the one before. Default: ``block_size - 1``, each token once.
        num_proc: Processes that encode a map-style data set; the examples do not depend on it.
        seed: Seed of the order in which the shards of a stream are read.

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
    if isinstance(documents, datasets.IterableDataset):
        documents = DocumentShards(documents)
    first = next(iter(documents.documents if isinstance(documents, DocumentShards) else documents), None)
    if first is None:
        raise ValueError(NO_TEXT)
    if "text" not in first:
        raise ValueError(f"the documents need a column 'text', they have {sorted(first)}")
    if isinstance(documents, DocumentShards):
        return StreamingBlocks(documents, tokenizer, windows, seed)
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
