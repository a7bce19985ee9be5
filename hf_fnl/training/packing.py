"""Batches without padding: the examples of a batch put side by side in rows of one length.

Which examples a batch has is not decided here, so data order, resuming and the number of examples in a step stay as
they are in padded batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX

PACKING_HELP = (
    "Several examples in a row, none of which sees another, instead of padding. In pretraining the losses are those of "
    "padded batches; in question answering the softmax of a window covers its own tokens, and no padding."
)
PACKED_LENGTH_HELP = "Tokens of such a row. Default: those of the longest example."

_PER_EXAMPLE = ("next_sentence_label", "start_positions", "end_positions")


def first_fit(lengths: Sequence[int], width: int) -> tuple[list[int], int]:
    """Put examples into rows, the longest first, each into the first row that has room.

    Args:
        lengths: Of the examples.
        width: Of a row.

    Returns:
        Where each example begins among the tokens of all rows, and how many rows there are: at most 11/9 of the fewest
        possible, and one more.

    Raises:
        ValueError: If an example is longer than a row.
    """
    if (longest := max(lengths)) > width:
        raise ValueError(f"an example has {longest} tokens, more than packed_length={width}: raise packed_length")
    starts, room = [0] * len(lengths), np.full(len(lengths), width)
    for example in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        row = int((room >= lengths[example]).argmax())
        starts[example] = (row + 1) * width - int(room[row])
        room[row] -= lengths[example]
    return starts, int((room < width).sum())


@dataclass(frozen=True)
class PackingCollator:
    """Packed batches for a factorized BERT, of pretraining examples or of windows for question answering.

    Labels are those of a padded batch, one example a row, and so are the outputs of the model; only what its layers
    compute on lies in rows. A batch has as many rows as its examples need.

    Attributes:
        tokenizer: For the id of its padding token, which fills up rows.
        max_length: Tokens of an example at most.
        packed_length: Tokens of a row; ``max_length`` unless given. Longer rows leave less room unused and cost more
            attention.

    Raises:
        ValueError: If ``packed_length`` is below ``max_length``.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    packed_length: int | None = None

    def __post_init__(self) -> None:
        if self.packed_length is not None and self.packed_length < self.max_length:
            raise ValueError(
                f"packed_length must be at least {self.max_length}, the longest that an example may be, got "
                f"{self.packed_length}"
            )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch: labels, ``packing`` and, in rows, ``input_ids``, ``token_type_ids`` and ``position_ids``.

        Raises:
            ValueError: If an example is longer than ``max_length``.
        """
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        if lengths.max() > self.max_length:
            raise ValueError(f"an example has {lengths.max()} tokens, more than max_length={self.max_length}")
        width = self.packed_length or self.max_length
        starts, rows = first_fit(lengths.tolist(), width)
        within = torch.arange(self.max_length)
        index, is_token = torch.tensor(starts)[:, None] + within, within < lengths[:, None]
        places, total = index[is_token], rows * width

        def lay_out(values: Tensor, filling: int = 0) -> Tensor:
            return torch.full((total,), filling).index_copy_(0, places, values).view(rows, width)

        batch: dict[str, Any] = _labels(examples, is_token)
        batch["packing"] = {
            "index": index % total,
            "lengths": lengths,
            "sequence_ids": lay_out(torch.repeat_interleave(lengths), -1),
            # A row that is filled up ends with a part of its own, a full one with a part of no token.
            "bounds": torch.cat([index[:, 0] + lengths, torch.arange(rows + 1) * width]).sort().values.int(),
        }
        batch["input_ids"] = lay_out(joined(examples, "input_ids"), self.tokenizer.pad_token_id)
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = lay_out(joined(examples, "token_type_ids"))
        batch["position_ids"] = lay_out(within.expand_as(index)[is_token])
        return batch


def joined(examples: Sequence[Mapping[str, Any]], name: str) -> Tensor:
    """The lists or tensors of all examples, one after the other."""
    parts = [example[name] for example in examples]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else torch.from_numpy(np.concatenate(parts))


def _labels(examples: Sequence[Mapping[str, Any]], is_token: Tensor) -> dict[str, Tensor]:
    """Labels as in a padded batch; they come first, since the Trainer counts examples by the first entry."""
    given = [name for name in _PER_EXAMPLE if name in examples[0]]
    labels = {name: torch.tensor([int(example[name]) for example in examples]) for name in given}
    if "labels" in examples[0]:
        padded = torch.full(is_token.shape, IGNORE_INDEX)
        labels["labels"] = padded.masked_scatter_(is_token, joined(examples, "labels"))
    return labels


def packing_collator(
    tokenizer: PreTrainedTokenizerBase, max_length: int, *, packing: bool, packed_length: int | None
) -> PackingCollator | None:
    """The collator that the options of a script ask for; ``None`` for a padding one.

    Raises:
        ValueError: If ``packed_length`` is too small, or given without ``packing``.
    """
    if packing:
        return PackingCollator(tokenizer, max_length, packed_length)
    if packed_length is not None:
        raise ValueError(f"packed_length={packed_length} is for packing=true; batches are padded without it")
    return None


def check_packing(collate: object, model: nn.Module, args: TrainingArguments) -> None:
    """Check that packed batches, if ``collate`` makes them, can be trained on.

    Raises:
        ValueError: If the model would not keep the sequences of a row apart, or one process drives several GPUs, which
            would divide a batch by rows.
    """
    if not isinstance(collate, PackingCollator):
        return
    if not getattr(model, "takes_packing", False):  # a stock model would take such a batch without a word
        raise ValueError(
            f"packing needs a factorized BERT, which keeps the sequences of a row apart; {type(model).__name__} does "
            "not: leave packing out, or train one of hf_fnl's classes, such as FactorizedBertForPreTraining (without "
            "ranks its layers are dense)"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"packing needs a process for each GPU, and this one sees {args.n_gpu}: start it with accelerate launch"
        )
