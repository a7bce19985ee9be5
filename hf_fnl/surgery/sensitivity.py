"""Fisher information of what layers put out: how much a model's outputs, or the loss of labels, feel it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.surgery.blocks import run_over, tensors_in

ENOUGH = 2**14  # labels, or positions; means over more of them cost time and hardly move


def squares(gradient: Tensor) -> Tensor:
    """Return the sum of the squares of gradients ``(..., m)``, shape ``(m,)``."""
    return gradient.flatten(0, -2).square().sum(0)


@dataclass(frozen=True)
class Probe:
    """Where gradients are looked at, and what is summed of them.

    Args:
        modules: Modules whose outputs are looked at.
        summed: Makes a tensor of the gradient of an output, in float64.
    """

    modules: Sequence[nn.Module]
    summed: Callable[[Tensor], Tensor] = squares


@torch.enable_grad()
def sensitivities(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], probes: Mapping[str, Probe]
) -> dict[str, Tensor]:
    r"""Squares of a loss's gradient at the outputs of layers, ``(\partial L / \partial y_i)^2``, summed per label.

    ``L`` is the sum over tokens of the loss that the model computes from the ``labels`` in a batch, as the mean of
    those that are not ignored. Where there are none, it is one whose mean square gradient is the curvature of the
    distance from the model's own outputs: of a language model the loss of labels that are drawn from its logits, else
    the sum of all outputs with random signs. A position counts as a label then.

    The sum is over all outputs of a layer, so that one that gives many of them for a label counts by all; it is zero
    where no loss feels a layer. Where there is an output for each label, it is the mean. Parameters get no gradient;
    one batch's activations are in memory at a time. Batches from all over the data are run until they held 16,384
    labels and every layer was reached.

    Args:
        model: The model, in the mode that it is to be measured in.
        batches: Inputs, with ``labels`` in all or in none.
        probes: Where to look, by names.

    Returns:
        What each probe sums, of which squares are one, over the labels, in float64; nothing where no gradient flows.

    Raises:
        ValueError: If there are labels and the model returns no loss, or one that is not finite, or predicts none of
            them; if there are none and it returns no tensor; if a gradient is not finite.

    Warns:
        UserWarning: If no gradient flows to any probe.
    """
    sums: dict[str, Tensor] = {}
    num_labels, is_felt = 0, not probes
    generator = torch.Generator().manual_seed(0)

    def add(name: str, gradient: Tensor) -> None:
        sums[name] = sums[name] + probes[name].summed(gradient.detach().double())

    def hook(name: str) -> Callable[..., Tensor]:
        @torch.enable_grad()
        def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.requires_grad_().clone()  # the model may write into it, as it may not into a leaf
            sums.setdefault(name, probes[name].summed(output.new_zeros(1, output.shape[-1], dtype=torch.float64)))
            output.register_hook(lambda gradient: add(name, gradient))
            return output

        return watch

    with _frozen(model), ExitStack() as stack:
        for name, probe in probes.items():
            for module in probe.modules:
                stack.enter_context(module.register_forward_hook(hook(name)))
        for batch, labels in _spread(batches):
            if num_labels >= ENOUGH and len(sums) == len(probes):
                break
            outputs = run_over(model, batch)
            if "labels" not in batch:
                loss = _drawn_loss(model, outputs, generator)
            elif (mean := _loss(model, outputs, batch["labels"])) is not None:
                loss = mean * labels  # the sum, for in float16 gradients of the mean underflow
            else:
                continue
            num_labels += labels
            if loss.requires_grad:
                is_felt = True
                loss.backward()
    if not num_labels:
        raise ValueError("the calibration data hold labels, and none that is predicted: are all of them ignored?")
    if not is_felt:
        warnings.warn(
            f"no gradients flow from what {type(model).__name__} returns to its layers, so that calibration takes all "
            "their outputs for alike: does its forward pass run without gradients?",
            stacklevel=2,
        )
        return {}
    if wrong := next((name for name, total in sums.items() if not total.isfinite().all()), None):
        raise ValueError(f"gradients at {wrong} hold NaN or Inf in the calibration data: are all weights finite?")
    return {name: total / num_labels for name, total in sums.items()}


def _loss(model: nn.Module, outputs: Any, labels: Tensor) -> Tensor | None:
    """The loss of labels; ``None`` if a causal model predicts none, as that of the first token or what is ignored."""
    loss: Tensor | None = getattr(outputs, "loss", None)
    if loss is not None and loss.isfinite().all():
        return loss
    if loss is not None and loss.isnan() and (labels[..., 1:] == IGNORE_INDEX).all():
        return None
    got = "no loss" if loss is None else f"a loss of {loss.item():g}"
    raise ValueError(f"the calibration data hold labels, for which {type(model).__name__} returned {got}")


def _drawn_loss(model: nn.Module, outputs: Any, generator: torch.Generator) -> Tensor:
    """A loss of drawn labels or signs, whose mean square gradient is the Fisher information of the outputs."""
    logits = getattr(outputs, "logits", None)
    if logits is not None and _is_language_model(model):
        logits = logits.flatten(0, -2).float()
        if logits.isnan().any():
            raise ValueError(f"{type(model).__name__} returned logits that hold NaN or Inf for the calibration data")
        drawn = logits.detach().softmax(-1).cpu().multinomial(1, generator=generator).squeeze(-1)
        return nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
    returned = outputs if isinstance(outputs, Tensor | Mapping | tuple | list) else vars(outputs)
    found = [x for x in tensors_in(returned) if x.is_floating_point()]
    if not found:
        raise ValueError(f"calibration needs to see what {type(model).__name__} returns, and there is no tensor in it")
    signs = (2.0 * torch.randint(2, x.shape, generator=generator).to(x.device) - 1 for x in found)
    return torch.stack([(x.float() * by).sum() for x, by in zip(found, signs, strict=True)]).sum()


def _is_language_model(model: nn.Module) -> bool:
    embeddings = getattr(model, "get_output_embeddings", None)
    return embeddings is not None and embeddings() is not None


def _spread(batches: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[Mapping[str, Tensor], int]]:
    """Batches that hold labels, and how many, in an order in which the first hold enough and lie evenly apart."""
    counted = [(batch, count) for batch in batches if (count := _num_labels(batch))]
    apart = max(1, sum(count for _, count in counted) // ENOUGH)
    for first in range(apart):
        yield from counted[first::apart]


def _num_labels(batch: Mapping[str, Tensor]) -> int:
    return int((batch["labels"] != IGNORE_INDEX).sum()) if "labels" in batch else num_positions(batch)


def num_positions(batch: Mapping[str, Tensor]) -> int:
    """Return the number of positions of tokens in a batch, or of its rows."""
    given = next(iter(batch.values()))
    return len(given) if given.is_floating_point() else given.numel()


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
