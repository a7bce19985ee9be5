"""Diagonal empirical Fisher information of the outputs of layers, from labels in the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX

ENOUGH = 2**14  # labels; means over more of them cost time and hardly move


@torch.enable_grad()
def sensitivities(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], layers: Mapping[str, Sequence[nn.Module]]
) -> dict[str, Tensor]:
    r"""Squares of a loss's gradient at the outputs of layers, ``(\partial L / \partial y_i)^2``, summed per label.

    ``L`` is the sum over tokens of the loss that the model computes from the ``labels`` in a batch, as the mean of
    those that are not ignored. The sum is over all outputs of a layer, so that one that gives many of them for a label
    counts by all; it is zero where no loss feels a layer. Where there is an output for each label, it is the mean.
    Parameters get no gradient; one batch's activations are in memory at a time. Batches from all over the data are run
    until they held 16,384 labels and every layer was reached.

    Args:
        model: The model, in the mode that it is to be measured in.
        batches: Inputs with ``labels``.
        layers: Modules by names; several of one name are measured in one.

    Returns:
        A vector ``(m,)`` in float64 for each name, ``m`` being the width of the output.

    Raises:
        ValueError: If the model returns no loss, or one that is not finite.
    """
    sums: dict[str, Tensor] = {}
    num_labels = 0

    def add(name: str, gradient: Tensor) -> None:
        sums[name] += gradient.detach().double().flatten(0, -2).square().sum(0)

    def hook(name: str) -> Callable[..., Tensor]:
        @torch.enable_grad()
        def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.requires_grad_().clone()  # the model may write into it, as it may not into a leaf
            sums.setdefault(name, output.new_zeros(output.shape[-1], dtype=torch.float64))
            output.register_hook(lambda gradient: add(name, gradient))
            return output

        return watch

    with _frozen(model), ExitStack() as stack:
        for name, modules in layers.items():
            for module in modules:
                stack.enter_context(module.register_forward_hook(hook(name)))
        device = next(model.parameters()).device
        for batch, labels in _spread(batches):
            if num_labels >= ENOUGH and len(sums) == len(layers):
                break
            loss = getattr(model(**{name: value.to(device) for name, value in batch.items()}), "loss", None)
            if loss is None or not loss.isfinite().all():
                got = "no loss" if loss is None else f"a loss of {loss.item():g}"
                raise ValueError(f"the calibration data hold labels, for which {type(model).__name__} returned {got}")
            num_labels += labels
            if loss.requires_grad:
                (loss * labels).backward()  # of the sum, for in float16 gradients of the mean underflow
    return {name: total / num_labels for name, total in sums.items()}


def _spread(batches: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[Mapping[str, Tensor], int]]:
    """Batches with how many labels they hold, in an order in which the first hold enough and lie evenly apart."""
    labels = [int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches]
    apart = max(1, sum(labels) // ENOUGH)
    for first in range(apart):
        yield from zip(batches[first::apart], labels[first::apart], strict=True)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients; afterwards as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
