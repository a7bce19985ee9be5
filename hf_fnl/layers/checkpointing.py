"""Activation checkpointing that keeps what is narrow, and computes the rest again."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

# Position, among the arguments, of the matrix whose rows are mapped.
_ROWS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}


def keep_narrow() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The ``context_fn`` of :func:`torch.utils.checkpoint.checkpoint` that keeps the outputs of narrowing products.

    Of a block that is checkpointed, what a product made narrower than its own input is kept for the backward pass:
    the ``(tokens, rank)`` middle of a factorized layer, queries and keys of narrowed heads, and the output of a
    feed-forward network. All else is computed again: what is wide (the GELU's input and output) and what costs little
    (dropout, LayerNorm). Only the widening half of the products is paid for twice.

    With Transformers (before 5.23: ``gradient_checkpointing``)::

        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": keep_narrow})

    and with our Trainer, ``FLAMBeTrainingArguments(activation_checkpointing=True, keep_narrow=True)``.

    Returns:
        What the forward pass and what the repeated one is run in.
    """
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
    contexts = create_selective_checkpoint_contexts(_narrowing_is_kept)
    return contexts


def _narrowing_is_kept(
    context: SelectiveCheckpointContext, operation: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if operation in _ROWS and context.op_output.shape[1] < args[_ROWS[operation]].shape[1]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
