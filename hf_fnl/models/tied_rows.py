"""One gradient for a table of which a model both looks rows up and multiplies with, made once and never copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fnl.models.vocabulary import is_plain


class _TiedRows(torch.autograd.Function):
    """Rows of a table and the table itself, whose gradients meet here.

    Otherwise autograd makes a gradient of zeros for the rows, as large as the table, and a third tensor for the sum. On
    a CPU this takes as long as several layers of a factorized BERT.
    """

    @staticmethod
    def forward(table: Tensor, ids: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int | None], output: tuple[Tensor, Tensor]) -> None:
        _, ids, ctx.padding_idx = inputs
        ctx.save_for_backward(ids)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_table: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            d_rows = d_rows.masked_fill((ids == ctx.padding_idx).unsqueeze(-1), 0)
        # Where the gradient is to be differentiated itself, nothing may be written into it.
        add = d_table.index_add if torch.is_grad_enabled() else d_table.index_add_
        return add(0, ids.flatten(), d_rows.flatten(0, -2).to(d_table.dtype)), None, None


def tied_inputs(
    embedding: nn.Module, output: nn.Module, input_ids: Tensor
) -> tuple[Tensor, None, None] | tuple[None, Tensor, Tensor]:
    """What a backbone is given, and what the output matrix is to be replaced with, for one gradient of both.

    Args:
        embedding: The word embedding.
        output: The output matrix over the vocabulary, which does not have to be tied to it.
        input_ids: Of tokens, any shape.

    Returns:
        ``None``, the embeddings, and the table to multiply with. Or ``input_ids`` and twice ``None``, where nothing is
        gained or one of the modules is not plain; see :func:`~hf_fnl.models.vocabulary.is_plain`.
    """
    plain = is_plain(embedding, nn.Embedding) and is_plain(output, nn.Linear)
    if not plain or embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return input_ids, None, None
    table = embedding.get_parameter("weight")
    is_tied = table is output.weight and table.requires_grad and torch.is_grad_enabled()
    if not is_tied or table.device.type != "cpu" or torch.compiler.is_compiling():
        return input_ids, None, None  # on a GPU these bytes are quickly moved, and a compiler plans for itself
    embeds, table = _TiedRows.apply(table, input_ids, embedding.padding_idx)
    return None, embeds, table
