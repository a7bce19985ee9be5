"""Data sets of BERT's pretraining examples, stored or streamed, masked when they are read.

The mask of an example is a pure function of the options' seed, the epoch and the example's place. So a resumed run sees
what an uninterrupted one would, two processes see what one would, and no prefetching changes anything.
"""

from __future__ import annotations

from itertools import islice
from typing import Any
from zlib import crc32

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_fnl.tasks.pretraining_examples import Instance, PretrainingOptions, Vocabulary, make_example, make_instances
from hf_fnl.tasks.sentences import Document, tokenize_documents

# Random next sentences are drawn within such a group, and a stream has one of them in memory.
DOCUMENTS_PER_GROUP = 256
# First word of every generator's seed, so that no two uses share a stream.
_PAIRING, _MASKING, _STREAMING = 1, 2, 3

_GROUPED = {"batched": True, "batch_size": DOCUMENTS_PER_GROUP}
_IDS, _LENGTH = datasets.List(datasets.Value("int32")), datasets.Value("int32")
_DOCUMENTS = datasets.Features({"tokens": _IDS, "bounds": _IDS})
_PACKED = datasets.Features({"input_ids": _IDS})
_PAIRS = datasets.Features({"input_ids": _IDS, "first_length": _LENGTH, "next_sentence_label": _LENGTH})


class PretrainingDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
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
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change
        self.instances = instances.with_format("numpy")
        self.vocabulary = vocabulary
        self.options = options

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; a data loader of accelerate calls this."""
        self._epoch.fill_(epoch)

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


def build_pretraining_dataset(
    documents: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    options: PretrainingOptions,
    *,
    num_proc: int | None = None,
) -> PretrainingDataset | datasets.IterableDataset:
    """Turn documents into masked examples for a data loader or a Trainer.

    Transformers' ``DataCollatorForTokenClassification`` pads them.

    Args:
        documents: Column ``text``, one document a row. A map-style data set is tokenized and paired once, into Arrow
            files that ``datasets`` caches; an iterable one as it is read, a group of documents at a time, whose
            examples and masks are a function of the seed, the group and its place in the stream.
        tokenizer: Tokenizer with ``[CLS]``, ``[SEP]``, ``[MASK]`` and ``[PAD]``.
        options: What the examples are like.
        num_proc: Processes that tokenize a map-style data set; the examples do not depend on it.

    Returns:
        A data set of dictionaries with ``input_ids``, ``token_type_ids``, ``labels`` (-100 where nothing is predicted)
        and, for pairs, ``next_sentence_label`` (0: follows, 1: random).

    Raises:
        ValueError: If there is no column ``text``, there are too few documents with text, the tokenizer lacks a token
            or allows no such length.
    """
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    if options.max_seq_length > (limit := tokenizer.model_max_length):
        raise ValueError(f"max_seq_length is {options.max_seq_length}, above the tokenizer's limit of {limit}")
    rows = list(islice(documents, 2))
    if rows and "text" not in rows[0]:
        raise ValueError(f"the documents need a column 'text', they have {sorted(rows[0])}")
    _check_count(len(rows), options)
    if isinstance(documents, datasets.IterableDataset):
        made_with = {"tokenizer": tokenizer, "options": options, "vocabulary": vocabulary}
        return documents.map(
            _stream_examples, with_indices=True, fn_kwargs=made_with, remove_columns=[*rows[0]], **_GROUPED
        )
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


def _stream_examples(
    batch: dict[str, list[str | None]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    options: PretrainingOptions,
    vocabulary: Vocabulary,
) -> dict[str, list[Tensor]]:
    """Make the masked examples of a group of documents, in random order."""
    # The places of the groups of several processes and workers are the same; their texts are not.
    texts = crc32("\0".join(text or "" for text in batch["text"]).encode())
    rng = np.random.default_rng([_STREAMING, options.seed, indices[0], texts])
    instances = make_instances(tokenize_documents(batch["text"], tokenizer), options, vocabulary, rng)
    order = rng.permutation(len(instances))
    examples = [make_example(instances[number], options, vocabulary, rng) for number in order]
    names = ("input_ids", "token_type_ids", "labels", *(["next_sentence_label"] if options.next_sentence else []))
    return {name: [example[name] for example in examples] for name in names}


def _check_count(found: int, options: PretrainingOptions) -> None:
    if found == 0:
        raise ValueError("no document with text to make examples of")
    if options.next_sentence and found == 1:
        raise ValueError("next_sentence=True needs two documents with text at least, got 1; or set next_sentence=False")
