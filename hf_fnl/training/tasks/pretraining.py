"""BERT's pretraining examples from raw documents: sentence pairs or packed sentences, masked when they are read.

The mask of an example is a pure function of the options' seed, the epoch and the example's index. So a resumed run sees
what an uninterrupted one would, two processes see what one would, and no prefetching changes anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.training.tasks.documents import Document, tokenize_documents
from hf_fnl.training.tasks.wordpiece import Vocabulary
from hf_fnl.vocabulary_loss import IGNORE_INDEX

MIN_SEQ_LENGTH = 8
# Random next sentences are drawn within such a group, and a stream keeps one of them in memory.
DOCUMENTS_PER_GROUP = 256
# First word of every generator's seed, so that no two uses share a stream.
_PAIRING, _MASKING, _STREAMING = 1, 2, 3

_GROUPED = {"batched": True, "batch_size": DOCUMENTS_PER_GROUP}
_IDS, _LENGTH = datasets.List(datasets.Value("int32")), datasets.Value("int32")
_DOCUMENTS = datasets.Features({"tokens": _IDS, "bounds": _IDS})
_PACKED = datasets.Features({"input_ids": _IDS})
_PAIRS = datasets.Features({"input_ids": _IDS, "first_length": _LENGTH, "next_sentence_label": _LENGTH})


@dataclass(frozen=True, kw_only=True)
class PretrainingOptions:
    """How documents become examples (Devlin et al. 2019, Sec. 3.1 and A.2).

    Attributes:
        max_seq_length: Length that no example exceeds, special tokens included.
        next_sentence: Sentence pairs with a next-sentence label; without, whole sentences packed up to the length, on
            into the next document behind a separator (the FULL-SENTENCES format of Liu et al. 2019).
        short_sequence_probability: Share of documents whose pairs are made to a random shorter length.
        mlm_probability: Share of the tokens of an example, special ones counted in, that are to be predicted.
        whole_word_mask: Choose all pieces of a word together.
        seed: Seed of everything random here.
    """

    max_seq_length: int = 128
    next_sentence: bool = True
    short_sequence_probability: float = 0.1
    mlm_probability: float = 0.15
    whole_word_mask: bool = False
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_seq_length < MIN_SEQ_LENGTH:
            raise ValueError(f"max_seq_length must be at least {MIN_SEQ_LENGTH}, got {self.max_seq_length}")
        if not 0 <= self.short_sequence_probability <= 1:
            raise ValueError(f"short_sequence_probability must be in [0, 1], got {self.short_sequence_probability}")
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def num_masked(self, length: int) -> int:
        """Tokens to predict in an example of ``length`` tokens: BERT's count, ``max(1, round(length * p))``."""
        return max(1, round(length * self.mlm_probability))


class Instance(NamedTuple):
    """An example before masking: token ids with special tokens, how many of them make the first segment, the label."""

    input_ids: NDArray[np.int32]
    first_length: int
    next_sentence_label: int | None


def make_instances(
    documents: Sequence[Document], options: PretrainingOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Instance]:
    """Make the examples of a group of documents, unmasked.

    Args:
        documents: Documents; the random next sentences of each come from the others.
        options: How.
        vocabulary: For the ids of ``[CLS]`` and ``[SEP]``.
        rng: Used for pairs only.

    Returns:
        ``[CLS] A [SEP] B [SEP]`` with label 0 where B follows A in its document and 1 where it comes from another one;
        without ``next_sentence``, ``[CLS] A [SEP]``.
    """
    start, end = np.array([[vocabulary.cls_id], [vocabulary.sep_id]], dtype=np.int32)
    if not options.next_sentence:
        packed = pack_sentences(documents, options.max_seq_length - 2, vocabulary.sep_id)
        return [Instance(np.concatenate([start, tokens, end]), len(tokens) + 2, None) for tokens in packed]
    pairs = chain.from_iterable(sentence_pairs(documents, index, options, rng) for index in range(len(documents)))
    return [Instance(np.concatenate([start, a, end, b, end]), len(a) + 2, label) for a, b, label in pairs]


def sentence_pairs(
    documents: Sequence[Document], index: int, options: PretrainingOptions, rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32], int]]:
    """Make the pairs of one document as BERT's data preparation does.

    Sentences are gathered up to the target length and divided at random. The second part stays (label 0) or is replaced
    by as much of another document (label 1), and then its sentences are used again. A single sentence left over has no
    second part, so it always gets a random one. A document alone in its group can only give true pairs.

    Args:
        documents: The group of documents.
        index: The document to make pairs of.
        options: ``max_seq_length`` and ``short_sequence_probability`` are used.
        rng: Source of all choices.

    Yields:
        First segment, second segment, label.
    """
    tokens, bounds = documents[index]
    limit = options.max_seq_length - 3
    is_short = rng.random() < options.short_sequence_probability
    target = int(rng.integers(2, limit, endpoint=True)) if is_short else limit
    first, last = 0, len(bounds) - 1
    while first < last:
        stop = min(int(bounds.searchsorted(bounds[first] + target)), last)
        alone = stop - first == 1
        middle = stop if alone else int(rng.integers(first + 1, stop))
        a = tokens[bounds[first] : bounds[middle]]
        if len(documents) > 1 and (alone or rng.random() < 0.5):
            b = _random_segment(documents, index, target - len(a), rng)
            yield *_truncate(a, b, limit, rng), 1
            first = middle
            continue
        if not alone:
            yield *_truncate(a, tokens[bounds[middle] : bounds[stop]], limit, rng), 0
        first = stop


def _random_segment(
    documents: Sequence[Document], index: int, length: int, rng: np.random.Generator
) -> NDArray[np.int32]:
    """Sentences of another document from a random one on, until ``length`` is reached; one at least."""
    other = int(rng.integers(len(documents) - 1))
    tokens, bounds = documents[other + (other >= index)]
    start = bounds[rng.integers(len(bounds) - 1)]
    stop = bounds[min(bounds.searchsorted(start + max(length, 1)), len(bounds) - 1)]
    return tokens[start:stop]


def _truncate(
    a: NDArray[np.int32], b: NDArray[np.int32], limit: int, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Shorten the longer segment, and both in turn once they are equal, token by token at random ends."""
    keep_b = min(len(b), max(limit // 2, limit - len(a)))
    keep_a = min(len(a), limit - keep_b)
    from_a, from_b = rng.binomial([len(a) - keep_a, len(b) - keep_b], 0.5)
    return a[from_a : from_a + keep_a], b[from_b : from_b + keep_b]


def pack_sentences(documents: Sequence[Document], limit: int, sep_id: int) -> Iterator[NDArray[np.int32]]:
    """Pack the sentences of all documents in their order into sequences; no token is lost or used twice.

    Args:
        documents: The documents. Inside a sequence ``sep_id`` stands between two of them.
        limit: Length of a sequence. A sentence above it is cut, any other stays whole.
        sep_id: The separator.

    Yields:
        Token ids, at least one and at most ``limit``.
    """
    if not documents:
        return
    separator = np.array([sep_id], dtype=np.int32)
    stream = np.concatenate([part for document in documents for part in (document.tokens, separator)])
    ends = np.cumsum([len(document.tokens) + 1 for document in documents])
    starts = np.concatenate([[0], ends[:-1]])
    bounds = np.concatenate([start + document.bounds for start, document in zip(starts, documents, strict=True)])
    separators = set(ends - 1)
    start, total = 0, len(stream) - 1
    while start < total:
        stop = int(bounds[bounds.searchsorted(min(start + limit, total), side="right") - 1])
        if stop <= start:
            stop = start + limit
        yield stream[start : stop - (stop - 1 in separators)]
        start = stop + (stop in separators)


def mask_tokens(
    input_ids: NDArray[np.int64], options: PretrainingOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose tokens to predict; of these, replace 80 % by ``[MASK]`` and 10 % by random tokens, and keep 10 %.

    Special tokens are neither chosen nor put in. ``options.num_masked`` tokens are chosen. Whole words are taken as
    long as they fit into that number; where none fits, one word.

    Args:
        input_ids: Token ids of one example, shape ``(length,)``.
        options: ``mlm_probability`` and ``whole_word_mask`` are used.
        vocabulary: Of the tokenizer that made the ids.
        rng: Source of all choices.

    Returns:
        The ids with replacements, and the labels: the original id where a token was chosen, -100 elsewhere.
    """
    candidates = np.flatnonzero(~vocabulary.is_special[input_ids])
    count = options.num_masked(len(input_ids))
    if options.whole_word_mask:
        chosen = _choose_words(candidates, vocabulary.continues_word[input_ids[candidates]], count, rng)
    else:
        chosen = rng.permutation(candidates)[:count]
    masked, labels = input_ids.copy(), np.full_like(input_ids, IGNORE_INDEX)
    labels[chosen] = input_ids[chosen]
    draw = rng.random(len(chosen))
    masked[chosen[draw < 0.8]] = vocabulary.mask_id
    replaced = chosen[draw >= 0.9]
    masked[replaced] = vocabulary.ordinary_ids[rng.integers(len(vocabulary.ordinary_ids), size=len(replaced))]
    return masked, labels


def _choose_words(
    candidates: NDArray[np.int64], continues: NDArray[np.bool_], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Positions of whole words in random order, passing over those that exceed what is left of ``count``."""
    starts_word = ~continues | (np.diff(candidates, prepend=-2) > 1)
    words = np.split(candidates, np.flatnonzero(starts_word)[1:])
    order = rng.permutation(len(words))
    chosen: list[NDArray[np.int64]] = []
    for index in order:
        if len(words[index]) <= count:
            chosen.append(words[index])
            count -= len(words[index])
    return np.concatenate(chosen or [words[order[0]]])


def make_example(
    instance: Instance, options: PretrainingOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Mask an instance and name its parts as Transformers' BERT models do."""
    input_ids, labels = mask_tokens(instance.input_ids.astype(np.int64), options, vocabulary, rng)
    token_type_ids = (np.arange(len(input_ids)) >= instance.first_length).astype(np.int64)
    arrays = {"input_ids": input_ids, "token_type_ids": token_type_ids, "labels": labels}
    example = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if instance.next_sentence_label is not None:
        example["next_sentence_label"] = torch.tensor(instance.next_sentence_label)
    return example


class _Epoch:
    """An epoch number in shared memory, so that persistent data loader workers see it change."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch; a data loader of accelerate calls this, as :class:`EpochCallback` does."""
        self._epoch.fill_(epoch)


class PretrainingDataset(_Epoch, torch.utils.data.Dataset[dict[str, Tensor]]):
    """Masked examples over instances that lie in an Arrow file; equal (seed, epoch, index) give equal examples.

    Give a Trainer :class:`EpochCallback` too, and an evaluation set that is an object of its own: each evaluation goes
    back to epoch 0.

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


class StreamingPretrainingDataset(_Epoch, torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Masked examples made while the documents are read; equal (seed, epoch) give the same stream.

    One group of documents is in memory at a time; its examples are shuffled. For several passes that a resumed run can
    follow, repeat the documents (``documents.repeat(n)``): a Trainer counts any number of passes as one epoch.
    """

    def __init__(
        self, documents: datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, options: PretrainingOptions
    ) -> None:
        super().__init__()
        self.documents = documents
        self.tokenizer = tokenizer
        self.options = options
        self.vocabulary = Vocabulary.from_tokenizer(tokenizer)

    def set_epoch(self, epoch: int) -> None:
        """Choose pairs, order and masks of an epoch; documents that are shuffled are shuffled anew."""
        super().set_epoch(epoch)
        self.documents.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        key = [_STREAMING, self.options.seed, int(self._epoch), worker.id if worker else 0]
        rows = iter(self.documents)
        groups = iter(lambda: [row["text"] for row in islice(rows, DOCUMENTS_PER_GROUP)], [])
        made = None  # stays so in a worker that got no shard of the documents
        for number, texts in enumerate(groups):
            rng = np.random.default_rng([*key, number])
            documents = tokenize_documents(texts, self.tokenizer)
            instances = make_instances(documents, self.options, self.vocabulary, rng)
            made = (made or 0) + len(instances)
            for index in rng.permutation(len(instances)):
                yield make_example(instances[index], self.options, self.vocabulary, rng)
        if made == 0:
            _check_count(0, self.options)


def build_pretraining_dataset(
    documents: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    options: PretrainingOptions,
    *,
    num_proc: int | None = None,
) -> PretrainingDataset | StreamingPretrainingDataset:
    """Turn documents into masked examples for a data loader or a Trainer, with :class:`PretrainingCollator`.

    Args:
        documents: Column ``text``, one document a row. A map-style data set is tokenized and paired once, into Arrow
            files that ``datasets`` caches; an iterable one as it is read.
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
    rows = list(islice(documents, 2))
    if rows and "text" not in rows[0]:
        raise ValueError(f"the documents need a column 'text', they have {sorted(rows[0])}")
    _check_count(len(rows), options)
    if isinstance(documents, datasets.IterableDataset):
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
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0, "labels": IGNORE_INDEX}
        batch = {"attention_mask": (torch.arange(width) < lengths[:, None]).long()}
        for name, value in padding.items():
            batch[name] = torch.full((len(examples), width), value)
            for row, example in zip(batch[name], examples, strict=True):
                row[: len(example[name])] = example[name]
        if "next_sentence_label" in examples[0]:
            batch["next_sentence_label"] = torch.stack([example["next_sentence_label"] for example in examples])
        return batch

    def _width(self, longest: int) -> int:
        width = self.max_length or longest
        if longest > width:
            raise ValueError(f"an example has {longest} tokens, more than the collator's max_length of {width}")
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple


class EpochCallback(TrainerCallback):
    """Tell the training set of a Trainer which epoch begins.

    accelerate's data loader does so by itself only where it uses the Trainer's batch sampler as it is. Where it wraps
    that, to share batches out to processes or to skip those that a resumed run has seen, the sampler gets the epoch and
    the data set does not.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the number of finished epochs on."""
        dataset = getattr(kwargs["train_dataloader"], "dataset", None)
        if isinstance(dataset, PretrainingDataset):
            dataset.set_epoch(int(state.epoch or 0))
