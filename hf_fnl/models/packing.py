"""Packed batches: several sequences in a row, each of which attends to itself only.

A model is given, beside ``input_ids``, ``token_type_ids`` and ``position_ids`` of shape ``(rows, width)``, a mapping
``packing``:

- ``index (sequences, longest)``: where each token of each sequence lies among the ``rows * width``; behind the end of a
  sequence, anywhere;
- ``lengths (sequences,)``: tokens of each sequence;
- ``sequence_ids (rows, width)``: the number of the sequence to which a token belongs, -1 where a row is filled up;
- ``bounds (parts + 1,)``: ends of the sequences, and of what fills rows up, in the order of the tokens; int32.

Only the backbone's layers see rows. Their outputs are taken apart, so that heads and whatever comes after them find one
sequence a row, as in a padded batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function

Packing = Mapping[str, Tensor]


def packed_attention(packing: Packing, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What keeps the sequences of a row apart in the attention: a mask made once for all layers, or their bounds.

    Args:
        packing: Of the batch.
        config: Names the kernel: ``eager``, ``sdpa``, ``flex_attention`` or one of flash attention.
        dtype: Of the model.

    Returns:
        Arguments of a backbone.

    Raises:
        ValueError: If the kernel is another one.
    """
    kernel, sequence_ids = config._attn_implementation, packing["sequence_ids"]
    if "flash" in kernel:
        bounds, longest = packing["bounds"], sequence_ids.shape[1]
        both = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return {"attention_mask": None, **both}
    if kernel == "flex_attention":
        apart = packed_sequence_mask_function(sequence_ids)
        return {
            "attention_mask": create_bidirectional_mask(config, sequence_ids[..., None], None, and_mask_function=apart)
        }
    if kernel not in ("sdpa", "eager"):
        raise ValueError(
            f"packed batches need attn_implementation eager, sdpa, flex_attention or flash_attention_2, got {kernel}"
        )
    mask = (sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]).contiguous()
    if kernel == "eager":
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {"attention_mask": mask}


def unpack(states: Tensor, packing: Packing) -> Tensor:
    """States ``(rows, width, hidden)`` as ``(sequences, longest, hidden)``, those behind a sequence's end arbitrary."""
    index = packing["index"]
    return states.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def inside(packing: Packing) -> Tensor:
    """Which of the unpacked positions ``(sequences, longest)`` are tokens."""
    index = packing["index"]
    return torch.arange(index.shape[1], device=index.device) < packing["lengths"][:, None]
