"""Losses that add up over the parts of a batch, and those that need no logits where there is no label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fnl.layers import FactorizedLinear
from hf_fnl.math.vocabulary_loss import IGNORE_INDEX, vocabulary_loss


def masked_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the cross-entropy summed over the labelled positions and divided by their number.

    Args:
        logits: ``(batch, length, vocab_size)``, or ``(labelled positions, vocab_size)``.
        labels: ``(batch, length)``, -100 where there is nothing to predict, or ``(labelled positions,)``.
        num_items_in_batch: Labelled positions in the whole batch, over accumulation steps and processes, of which these
            may be a part; their own number unless given.
    """
    logits, labels = logits.flatten(0, -2).float(), labels.flatten().to(logits.device)
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum().clamp(min=1)
    return total / num_items_in_batch


def next_sentence_loss(
    logits: Tensor,
    labels: Tensor,
    num_sequences_in_batch: Tensor | int | None = None,
    share_of_batch: Tensor | float = 1.0,
) -> Tensor:
    """Return the cross-entropy of next-sentence prediction, averaged over the sequences of the whole batch.

    Args:
        logits: ``(batch, 2)``.
        labels: ``(batch,)``.
        num_sequences_in_batch: Sequences in the whole batch, over accumulation steps and processes.
        share_of_batch: Weight of these sequences in the whole batch, where their number is not known.
    """
    if num_sequences_in_batch is None:
        return F.cross_entropy(logits.float(), labels) * share_of_batch
    return F.cross_entropy(logits.float(), labels, reduction="sum") / num_sequences_in_batch


def is_plain(module: nn.Module) -> bool:
    """Return whether calling a layer is a linear layer's forward with its own parameters, and nothing else.

    Only then may a computation go around the call. It is not so for a module of another class, which may be a subclass,
    a wrapper such as LoRA's, or parametrized or sharded; nor if a parameter is quantized or divided, ``forward`` was
    replaced, or there is a hook of any kind.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    parameters = list(module.parameters())
    return (
        type(module) in (nn.Linear, FactorizedLinear)
        and "forward" not in vars(module)
        and not any(hooks)
        and not torch.nn.modules.module._has_any_global_hook()
        and bool(parameters)
        and all(type(parameter) is nn.Parameter for parameter in parameters)
    )


def head_loss(head: nn.Linear | FactorizedLinear, hidden_states: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Return the cross-entropy of an output matrix, dense or factorized, without all of its logits in memory.

    Args:
        head: The output matrix, one that :func:`is_plain`.
        hidden_states: ``(..., hidden)``.
        labels: ``(...)``, -100 where nothing is to be predicted.
        options: As in :func:`~hf_fnl.math.vocabulary_loss.vocabulary_loss`.
    """
    weight: Tensor = head.weight
    if isinstance(head, FactorizedLinear):
        hidden_states, weight = hidden_states @ head.V, head.U
        if head.M is not None:
            hidden_states = F.linear(hidden_states, head.M)
    return vocabulary_loss(hidden_states, weight, labels, bias=head.bias, **options)
