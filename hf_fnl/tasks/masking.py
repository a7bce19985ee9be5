"""Masked language modelling: which tokens of an example are to be predicted, and what stands in their place.

Other than Transformers' collator this masks an example by a generator of its own, so that resumed runs and runs of
several processes see the same masks, with BERT's number of predictions in each, and replaces whole words as it does
single tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.tasks.pretraining_examples import Instance, PretrainingOptions, Vocabulary


def mask_tokens(
    input_ids: NDArray[np.int64], options: PretrainingOptions, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose tokens to predict; of these, replace 80 % by ``[MASK]`` and 10 % by random tokens, and keep 10 %.

    Special tokens are neither chosen nor put in. ``options.num_masked`` tokens are chosen. With ``whole_word_mask``
    words are taken as long as they fit into that number; where none fits, one word.

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
    """Return the positions of words in random order, without those that exceed what is left of ``count``."""
    starts_word = ~continues | (np.diff(candidates, prepend=-2) > 1)
    bounds = [0, *np.flatnonzero(starts_word)[1:].tolist(), len(candidates)]
    order = rng.permutation(len(bounds) - 1).tolist()
    chosen = []
    for word in order:
        if bounds[word + 1] - bounds[word] <= count:
            chosen.append(candidates[bounds[word] : bounds[word + 1]])
            count -= len(chosen[-1])
            if not count:
                break
    return np.concatenate(chosen or [candidates[bounds[order[0]] : bounds[order[0] + 1]]])


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
