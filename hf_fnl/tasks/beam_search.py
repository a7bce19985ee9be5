"""Translation of sentences by the beam search of Transformers, in batches of like length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from hf_fnl.tasks.length_batches import batch_bounds
from hf_fnl.tasks.pretrained import longest_sequence
from hf_fnl.training.command_line import progress


@torch.inference_mode()
def translate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    num_beams: int = 5,
    length_penalty: float = 1.0,
    max_tokens: int = 4096,
) -> list[str]:
    """Translate sentences by beam search.

    A translation has at most twice as many tokens as its sentence, and ten; it does not depend on the other sentences.

    Args:
        model: Encoder-decoder model, put into evaluation mode for the time.
        tokenizer: Its tokenizer; ``model_max_length`` bounds source and translation.
        sentences: Texts in the source language; an empty one gives an empty translation.
        num_beams: Hypotheses kept of each sentence; 1 is greedy search.
        length_penalty: Exponent of the length by which a hypothesis's log probability is divided.
        max_tokens: Source tokens of a batch at most, padding included, unless one sentence alone has more; memory
            grows with ``num_beams`` times that.

    Returns:
        Their translations, in the order of ``sentences``.

    Raises:
        ValueError: If ``num_beams`` is below 1 or a sentence is too long.
    """
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    # Said for greedy search too: a model's own settings may ask for beams.
    search = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": num_beams > 1}
    translations = [""] * len(sentences)
    longest = longest_sequence(model, tokenizer)
    rows, encoded = _encode(tokenizer, sentences, longest)
    lengths = np.array([len(ids) for ids in encoded])
    bounds = batch_bounds(lengths, max_tokens).tolist() if rows else []
    was_training = model.training
    model.eval()
    with progress("translating", len(rows)) as bar:
        for start, end in itertools.pairwise(bounds):
            batch = tokenizer.pad({"input_ids": encoded[start:end]}, return_tensors="pt").to(model.device)
            limits = torch.from_numpy(np.minimum(2 * lengths[start:end] + 10, longest - 1)).long()
            ends = _EndAtLimit(limits.repeat_interleave(num_beams).to(model.device), tokenizer.eos_token_id)
            processors = LogitsProcessorList([ends])
            longest_of_batch = int(limits.max())
            found = model.generate(
                **batch, max_new_tokens=longest_of_batch, logits_processor=processors, do_sample=False, **search
            )
            for row, text in zip(rows[start:end], tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
                translations[row] = text
            bar.update(end - start)
    model.train(was_training)
    return translations


class _EndAtLimit(LogitsProcessor):
    """Processor that ends each translation at a length of its own; ``max_new_tokens`` would be that of the batch.

    Args:
        limits: Tokens of each hypothesis at most, its end included, ``(sentences * beams,)``.
        end: Id of the token that ends a translation.
    """

    def __init__(self, limits: Tensor, end: int) -> None:
        self.limits, self.end = limits, end

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores with the end as the only choice where one token is left."""
        only_end = torch.full_like(scores, -torch.inf)
        only_end[:, self.end] = 0.0
        # A decoder's first token starts it and does not count.
        return torch.where(input_ids.shape[1] < self.limits[:, None], scores, only_end)


def _encode(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], limit: int | float
) -> tuple[list[int], list[list[int]]]:
    """Return the rows and token ids of the sentences that are not blank, the shortest first."""
    rows = [row for row, sentence in enumerate(sentences) if sentence.strip()]
    # Several tokenizers refuse an empty list.
    ids = tokenizer([sentences[row] for row in rows], verbose=False)["input_ids"] if rows else []
    order = sorted(range(len(rows)), key=lambda place: len(ids[place]))
    rows, ids = [rows[place] for place in order], [ids[place] for place in order]
    if ids and len(ids[-1]) > limit:
        raise ValueError(
            f"sentence {rows[-1] + 1} has {len(ids[-1])} tokens, the model takes {limit}; shorten or split it"
        )
    return rows, ids
