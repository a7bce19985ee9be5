"""Data sets of BERT's pretraining examples, stored or streamed, masked when they are read.

The mask of an example is a pure function of the options' seed, the epoch and the example's place. So a resumed run sees
what an uninterrupted one would, two processes see what one would, and no prefetching changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.tasks.document_shards import DocumentShards
from hf_fnl.tasks.documents import Document, tokenize_documents
from hf_fnl.tasks.masking import make_example
from hf_fnl.tasks.pretraining_examples import Instance, PretrainingOptions, Vocabulary, make_instances
from hf_fnl.training.streaming import Epoch, Example, ShardedStream

# Random next sentences are drawn within such a group, and a stream keeps one of them in memory.
DOCUMENTS_PER_GROUP = 256
# First word of every generator's seed, so that no two uses share a stream.
_PAIRING, _MASKING, _STREAMING, _STREAM_MASKING = 1, 2, 3, 4

_GROUPED = {"batched": True, "batch_size": DOCUMENTS_PER_GROUP}
_IDS, _LENGTH = datasets.List(datasets.Value("int32")), datasets.Value("int32")
_DOCUMENTS = datasets.Features({"tokens": _IDS, "bounds": _IDS})
_PACKED = datasets.Features({"input_ids": _IDS})
_PAIRS = datasets.Features({"input_ids": _IDS, "first_length": _LENGTH, "next_sentence_label": _LENGTH})


class PretrainingDataset(Epoch, torch.utils.data.Dataset[dict[str, Tensor]]):
    """Masked examples over instances that lie in an Arrow file; equal (seed, epoch, index) give equal examples.

    A Trainer other than :class:`~hf_fnl.training.FLAMBeTrainer` needs the callback
    :class:`~hf_fnl.training.callbacks.EpochCallback`. An evaluation set has to be an object of its own: each evaluation
    goes back to epoch 0.

    Args:
        instances: Columns ``input_ids`` and, for pairs, ``first_length`` and ``next_sentence_label``.
        vocabulary: Of the tokenizer that made them.
        options: How they are masked.
    """

    def __init__(self, instances: datasets.Dataset, vocabulary: Vocabulary, options: PretrainingOptions) -> None:
        super().__init__()
        self.instances = instances.with_format("numpy")
        self.vocabulary = vocabulary
        self.options = options

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([range(len(self))[index]])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """Read the examples of a batch at once, as torch's data loaders ask for them."""
        rows = self.instances[indices]
        first_lengths = rows.get("first_length", [self.options.max_seq_length] * len(indices))
        labels = rows.get("next_sentence_label", [None] * len(indices))
        instances = map(Instance, rows["input_ids"], first_lengths, labels)
        return [self._example(index, instance) for index, instance in zip(indices, instances, strict=True)]

    def _example(self, index: int, instance: Instance) -> dict[str, Tensor]:
        rng = np.random.default_rng([_MASKING, self.options.seed, int(self._epoch), index])
        return make_example(instance, self.options, self.vocabulary, rng)


class StreamingPretrainingDataset(ShardedStream):
    """Masked examples made while the documents are read.

    A group of documents of one shard is in memory at a time; its examples are shuffled. Equal (seed, epoch, shard,
    group, index) give equal examples; a place is a group and the index of an example in it.

    Args:
        documents: Their shards are those of the stream.
        tokenizer: As for :func:`build_pretraining_dataset`.
        options: What the examples are like.
    """

    start = (0, 0)

    def __init__(
        self, documents: DocumentShards, tokenizer: PreTrainedTokenizerBase, options: PretrainingOptions
    ) -> None:
        super().__init__()
        self.documents, self.tokenizer, self.options = documents, tokenizer, options
        self.num_shards, self.seed = documents.num_shards, options.seed
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)

    def identity(self) -> dict[str, Any]:
        """What gives places their meaning; the masks may change."""
        names = ("seed", "max_seq_length", "next_sentence", "short_sequence_probability")
        options = {name: getattr(self.options, name) for name in names}
        return {**self.documents.identity(), **options, "vocab_size": len(self.tokenizer)}

    def files(self) -> dict[str, int]:
        """The local files that are read, with their sizes in bytes."""
        return self.documents.files()

    def read(self, shard: int, epoch: int, place: Sequence[int]) -> Iterator[tuple[Example, tuple[int, ...]]]:
        """Make the examples of a shard from a place on."""
        first, first_index = place
        rows = self.documents.texts(shard, epoch=epoch, start=first * DOCUMENTS_PER_GROUP)
        groups = iter(lambda: list(islice(rows, DOCUMENTS_PER_GROUP)), [])
        for group, texts in enumerate(groups, start=first):
            key = [self.options.seed, epoch, shard, group]
            rng = np.random.default_rng([_STREAMING, *key])
            documents = tokenize_documents(texts, self.tokenizer)
            instances = make_instances(documents, self.options, self.vocabulary, rng)
            order = rng.permutation(len(instances))
            for index in range(first_index, len(instances)):
                rng = np.random.default_rng([_STREAM_MASKING, *key, index])
                example = make_example(instances[order[index]], self.options, self.vocabulary, rng)
                yield example, (group, index + 1)
            first_index = 0

    def __iter__(self) -> Iterator[Example]:
        example = None
        for example in super().__iter__():
            yield example
        if example is None and get_worker_info() is None:
            _check_count(0, self.options)


def build_pretraining_dataset(
    documents: datasets.Dataset | datasets.IterableDataset | DocumentShards,
    tokenizer: PreTrainedTokenizerBase,
    options: PretrainingOptions,
    *,
    num_proc: int | None = None,
) -> PretrainingDataset | StreamingPretrainingDataset:
    """Turn documents into masked examples for a data loader or a Trainer, with :class:`PretrainingCollator`.

    Args:
        documents: Column ``text``, one document a row. A map-style data set is tokenized and paired once, into Arrow
            files that ``datasets`` caches; an iterable one, or one in shards, as it is read.
        tokenizer: Tokenizer with ``[CLS]``, ``[SEP]``, ``[MASK]`` and ``[PAD]``.
        options: What the examples are like.
        num_proc: Processes that tokenize a map-style data set; the examples do not depend on it.

    Returns:
        A data set of dictionaries with ``input_ids``, ``token_type_ids``, ``labels`` (-100 where nothing is predicted)
        and, for pairs, ``next_sentence_label`` (0: follows, 1: random).

    Raises:
        ValueError: If there is no column ``text``, there are too few documents with text, the tokenizer lacks a token
            or allows no such length, or whole words are asked of one that is no WordPiece tokenizer.
    """
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    if options.max_seq_length > (limit := tokenizer.model_max_length):
        raise ValueError(f"max_seq_length is {options.max_seq_length}, above the tokenizer's limit of {limit}")
    if options.whole_word_mask and not vocabulary.continues_word.any():
        raise ValueError("whole_word_mask=True needs a WordPiece tokenizer; this one has no ## pieces")
    if isinstance(documents, datasets.IterableDataset):
        documents = DocumentShards(documents)
    rows = list(islice(documents.documents if isinstance(documents, DocumentShards) else documents, 2))
    if rows and "text" not in rows[0]:
        raise ValueError(f"the documents need a column 'text', they have {sorted(rows[0])}")
    _check_count(len(rows), options)
    if isinstance(documents, DocumentShards):
        _check_parts(documents, options)
        return StreamingPretrainingDataset(documents, tokenizer, options)
    tokenized = documents.map(
        _tokenize_batch,
        fn_kwargs={"tokenizer": tokenizer},
        features=_DOCUMENTS,
        remove_columns=documents.column_names,
        num_proc=num_proc,
        desc="Tokenizing documents",
        **_GROUPED,
    )
    _check_count(len(tokenized), options)
    instances = tokenized.with_format("numpy").map(
        _make_batch,
        with_indices=True,
        fn_kwargs={"options": options, "vocabulary": vocabulary},
        features=_PAIRS if options.next_sentence else _PACKED,
        remove_columns=tokenized.column_names,
        desc="Making examples",
        **_GROUPED,
    )
    return PretrainingDataset(instances, vocabulary, options)


def _tokenize_batch(batch: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    documents = tokenize_documents(batch["text"], tokenizer)
    return {"tokens": [tokens for tokens, _ in documents], "bounds": [bounds for _, bounds in documents]}


def _make_batch(
    batch: dict[str, Any], indices: list[int], options: PretrainingOptions, vocabulary: Vocabulary
) -> dict[str, Any]:
    documents = list(map(Document, batch["tokens"], batch["bounds"]))
    rng = np.random.default_rng([_PAIRING, options.seed, indices[0]])
    instances = make_instances(documents, options, vocabulary, rng)
    names = _PAIRS if options.next_sentence else _PACKED
    return {name: [getattr(instance, name) for instance in instances] for name in names}


def _check_parts(documents: DocumentShards, options: PretrainingOptions) -> None:
    """Random next sentences come from the same shard, so one that was made by division needs two documents."""
    if not options.next_sentence or documents.parts == 1:
        return
    needed = 2 * documents.num_shards
    if (found := sum(1 for _ in islice(documents.documents, needed))) < needed:
        raise ValueError(
            f"next_sentence=True needs two documents in each shard, and {documents.num_shards} shards have {found}: "
            f"set stream_shards to {max(1, found // 2)} or less"
        )


def _check_count(found: int, options: PretrainingOptions) -> None:
    if found == 0:
        raise ValueError("no document with text to make examples of")
    if options.next_sentence and found == 1:
        raise ValueError("next_sentence=True needs two documents with text at least, got 1; or set next_sentence=False")


@dataclass(frozen=True)
class PretrainingCollator:
    """Pad examples at their right to the longest and stack them; nothing here is random.

    Attributes:
        tokenizer: For the id of its padding token.
        pad_to_multiple_of: Round the length up to a multiple.
        max_length: Pad to this length instead of the longest; batches of one shape are what accelerate needs to hand a
            stream out to several processes.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None
    max_length: int | None = None

    def __call__(self, examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Make a batch, with ``attention_mask`` added.

        Raises:
            ValueError: If an example is longer than ``max_length``.
        """
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        width = self._width(int(lengths.max()))
        is_token = torch.arange(width) < lengths[:, None]
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0, "labels": IGNORE_INDEX}
        batch = {"attention_mask": is_token.long()}
        for name, value in padding.items():
            padded = torch.full(is_token.shape, value)
            batch[name] = padded.masked_scatter_(is_token, torch.cat([example[name] for example in examples]))
        if "next_sentence_label" in examples[0]:
            batch["next_sentence_label"] = torch.stack([example["next_sentence_label"] for example in examples])
        return batch

    def _width(self, longest: int) -> int:
        width = self.max_length or longest
        if longest > width:
            raise ValueError(f"an example has {longest} tokens, more than the collator's max_length of {width}")
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple
