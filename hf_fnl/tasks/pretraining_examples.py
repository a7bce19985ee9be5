"""BERT's pretraining examples: sentence pairs, or sentences packed up to the length, and what is masked in them.

Other than Transformers' collator this masks an example by a generator of its own, so that resumed runs and runs of
several processes see the same masks, with BERT's number of predictions in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.tasks.sentences import Document

MIN_SEQ_LENGTH = 8


@dataclass(frozen=True, kw_only=True)
class PretrainingOptions:
    """How documents become examples (Devlin et al. 2019, Sec. 3.1 and A.2).

    Attributes:
        max_seq_length: Length that no example exceeds, special tokens included.
        next_sentence: Sentence pairs with a next-sentence label; without, sentences packed up to the length, on into
            the next document behind a separator (the FULL-SENTENCES format of Liu et al. 2019).
        short_sequence_probability: Share of documents whose pairs are made to a random shorter length.
        mlm_probability: Share of the tokens of an example, special ones counted in, that are to be predicted.
        seed: Seed of everything random here.
    """

    max_seq_length: int = 128
    next_sentence: bool = True
    short_sequence_probability: float = 0.1
    mlm_probability: float = 0.15
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
        """Return the tokens to predict in an example of ``length`` tokens: BERT's ``max(1, round(length * p))``."""
        return max(1, round(length * self.mlm_probability))


class Vocabulary(NamedTuple):
    """Ids of a tokenizer's vocabulary that pairing and masking need; arrays are indexed by token id."""

    cls_id: int
    sep_id: int
    mask_id: int
    is_special: NDArray[np.bool_]
    ordinary_ids: NDArray[np.int64]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Read a tokenizer's vocabulary.

        Raises:
            ValueError: If the tokenizer lacks a special token that BERT's pretraining needs.
        """
        for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}; pretraining needs a tokenizer in the manner of BERT's")
        vocab = tokenizer.get_vocab()
        is_special = np.zeros(max(vocab.values()) + 1, dtype=bool)
        is_special[tokenizer.all_special_ids] = True
        ordinary_ids = np.setdiff1d(np.fromiter(vocab.values(), np.int64), tokenizer.all_special_ids)
        special_ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
        return cls(*special_ids, is_special, ordinary_ids)


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
    """Return sentences of another document from a random one on, until ``length`` is reached; one at least."""
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
    """Pack the sentences of all documents in their order into sequences that use each token once.

    Args:
        documents: The documents. Inside a sequence ``sep_id`` stands between two of them.
        limit: Length of a sequence. A sentence above it is cut, no other is.
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

    Special tokens are neither chosen nor put in. ``options.num_masked`` tokens are chosen.

    Args:
        input_ids: Token ids of one example, shape ``(length,)``.
        options: ``mlm_probability`` is used.
        vocabulary: Of the tokenizer that made the ids.
        rng: Source of all choices.

    Returns:
        The ids with replacements, and the labels: the original id where a token was chosen, -100 elsewhere.
    """
    candidates = np.flatnonzero(~vocabulary.is_special[input_ids])
    chosen = rng.permutation(candidates)[: options.num_masked(len(input_ids))]
    masked, labels = input_ids.copy(), np.full_like(input_ids, IGNORE_INDEX)
    labels[chosen] = input_ids[chosen]
    draw = rng.random(len(chosen))
    masked[chosen[draw < 0.8]] = vocabulary.mask_id
    replaced = chosen[draw >= 0.9]
    masked[replaced] = vocabulary.ordinary_ids[rng.integers(len(vocabulary.ordinary_ids), size=len(replaced))]
    return masked, labels


def make_example(
    instance: Instance, options: PretrainingOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Mask an instance and name its tensors as the BERT models of Transformers do."""
    input_ids, labels = mask_tokens(instance.input_ids.astype(np.int64), options, vocabulary, rng)
    token_type_ids = (np.arange(len(input_ids)) >= instance.first_length).astype(np.int64)
    arrays = {"input_ids": input_ids, "token_type_ids": token_type_ids, "labels": labels}
    example = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if instance.next_sentence_label is not None:
        example["next_sentence_label"] = torch.tensor(instance.next_sentence_label)
    return example
