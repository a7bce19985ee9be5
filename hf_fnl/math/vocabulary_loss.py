"""Cross-entropy over a vocabulary, whose logits are never in memory all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_fnl.math.precision import no_autocast

IGNORE_INDEX = -100  # label of what is not to be predicted, in torch and Transformers


def vocabulary_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int = 512,
) -> Tensor:
    r"""Cross-entropy of ``hidden_states @ weight.T + bias`` against labels, a chunk of positions at a time.

    A chunk's gradients are computed with its logits, of which no more than ``chunk_size * vocab_size`` are ever in
    memory, and kept for the backward pass. Nothing is shifted: position ``i`` is compared with ``labels[..., i]``.
    For a factorized ``weight = U V^T`` give ``hidden_states @ V`` and ``U``.

    Under autocast the logits are computed in its dtype and the loss in float32, as a linear layer followed by
    :func:`torch.nn.functional.cross_entropy` does.

    Args:
        hidden_states: Shape ``(..., n)``.
        weight: Shape ``(vocab_size, n)``.
        labels: Class of every position, shape ``(...)``.
        bias: Shape ``(vocab_size,)``.
        num_items_in_batch: What the summed loss is divided by. Default: the number of labels here that are not
            ignored, or 1 where all are.
        ignore_index: Label of positions that do not count.
        chunk_size: Positions whose logits are in memory together.

    Returns:
        The loss, a scalar, in float32 or better. Where gradients are to be differentiated themselves, they are computed
        from all logits. :mod:`torch.func` does not transform it.

    Raises:
        IndexError: If a label is neither in the vocabulary nor ``ignore_index``.
        ValueError: If the shapes do not fit, or ``chunk_size`` is less than 1.
    """
    # torch's own linear_cross_entropy is newer than the lowest torch that is supported.
    if hidden_states.shape[:-1] != labels.shape or hidden_states.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "hidden_states (..., n), weight (vocab_size, n) and labels (...) are needed, got shapes "
            f"{tuple(hidden_states.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    rows = hidden_states.flatten(0, -2)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (rows, weight, bias)]
    total = _SummedLoss.apply(rows, weight, bias, labels.flatten(), wanted, chunk_size, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum().clamp(min=1)
    return total / num_items_in_batch


class _SummedLoss(torch.autograd.Function):
    """Sum of the losses of all rows, whose gradients are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        wanted: list[bool],
        chunk_size: int,
        ignore_index: int,
    ) -> Tensor:
        device = rows.device.type
        is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else torch.promote_types(rows.dtype, weight.dtype)
        # A graph of torch.compile that held the loop would have been made for one number of chunks.
        compute = _summed_loss_op if torch.compiler.is_compiling() else _summed_loss
        total, *gradients = compute(rows, weight, bias, labels, wanted, dtype, chunk_size, ignore_index)
        ctx.wanted, ctx.ignore_index = wanted, ignore_index
        ctx.save_for_backward(rows, weight, bias, labels, *gradients)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, labels, *gradients = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated itself
            gradients = _gradients(rows, weight, bias, labels, ctx.ignore_index)
        pairs = zip(gradients, ctx.wanted, strict=True)
        return *(gradient * d_total if is_wanted else None for gradient, is_wanted in pairs), *[None] * 4


def _gradients(rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> list[Tensor]:
    """Gradients of the summed loss of rows, weight and bias, by operations that autograd follows."""
    counts = (labels != ignore_index).unsqueeze(-1)
    target = labels.unsqueeze(-1) == torch.arange(len(weight), device=labels.device)
    d_logits = (F.linear(rows, weight, bias).softmax(-1) - target.to(rows.dtype)) * counts
    return [d_logits @ weight, d_logits.mT @ rows, d_logits.sum(0)]


def _summed_loss(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    wanted: list[bool],
    dtype: torch.dtype,
    chunk_size: int,
    ignore_index: int,
) -> list[Tensor]:
    """The summed loss and its gradients of rows, weight and bias, without elements where they are not wanted."""
    accurate = torch.promote_types(dtype, torch.float32)  # of sums, whatever the dtype of the matrix products
    total, d_rows, d_weight, d_bias = made = _empty(rows, weight, wanted, accurate)
    for sums in (total, d_weight, d_bias):
        sums.zero_()
    x, w, b = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with no_autocast(rows.device):
        for start in range(0, len(rows), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = F.linear(x[chunk], w, b)
            loss, d_logits = _loss_and_gradient(logits, labels[chunk], any(wanted), ignore_index)
            total += loss
            if wanted[0]:
                d_rows[chunk] = d_logits @ w
            if wanted[1]:
                _add_product_(d_weight, d_logits.mT, x[chunk])
            if wanted[2]:
                d_bias += d_logits.sum(0, dtype=accurate)
    return made


def _empty(rows: Tensor, weight: Tensor, wanted: list[bool], accurate: torch.dtype) -> list[Tensor]:
    """Return the tensors of :func:`_summed_loss` without values."""
    shapes = rows.shape, weight.shape, weight.shape[:1]
    dtypes = rows.dtype, accurate, accurate
    gradients = [
        rows.new_empty(shape if is_wanted else (0,), dtype=dtype)
        for shape, dtype, is_wanted in zip(shapes, dtypes, wanted, strict=True)
    ]
    return [rows.new_empty((), dtype=accurate), *gradients]


_summed_loss_op = torch.library.custom_op("hf_fnl::summed_loss", _summed_loss, mutates_args=())


@_summed_loss_op.register_fake
def _(
    rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, wanted: list[bool], dtype: torch.dtype, *_: Any
) -> list[Tensor]:
    return _empty(rows, weight, wanted, torch.promote_types(dtype, torch.float32))


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right``; in the dtype of the total without a matrix in between."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _loss_and_gradient(logits: Tensor, labels: Tensor, is_wanted: bool, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk and, if it is wanted, the gradient of its logits (otherwise the logits).

    By formula, softmax minus target, so that the logits are gone through as few times as can be.
    """
    dtype = logits.dtype
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
    loss = F.nll_loss(log_p, labels, reduction="sum", ignore_index=ignore_index)
    if not is_wanted:
        return loss, logits
    counts, difference = (labels != ignore_index).unsqueeze(-1), log_p.exp_()
    on_label = difference.new_full((len(labels), 1), -1)
    difference.scatter_add_(-1, labels.unsqueeze(-1).where(counts, 0), on_label)
    return loss, difference.mul_(counts).to(dtype)
