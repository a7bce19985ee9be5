"""Masked language modelling: which tokens of an example are to be predicted, and what stands in their place.

Other than Transformers' collator this masks an example by a generator of its own, so that resumed runs and runs of
several processes see the same masks, with BERT's number of predictions in each.
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
