"""What the weights of a network are worth by the criteria of pruning methods; the highest scores stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hf_fnl.vision.pruning.counts import prunable_layers

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Scores = dict[str, Tensor]

TEMPERATURE = 200.0  # Wang et al. 2020, their code: makes the outputs of a fresh network near uniform


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model of Transformers returns for a batch with labels."""
    return model(**batch).loss


def tempered_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the logits, divided by a temperature of 200, against the ``labels`` of a batch."""
    return F.cross_entropy(model(**batch).logits / TEMPERATURE, batch["labels"])


@torch.no_grad()
def magnitude_scores(model: nn.Module, *, layers: Collection[nn.Module] | None = None) -> Scores:
    """``|w|`` of every weight of the chosen layers, by the name of the layer.

    Args:
        model: Any module.
        layers: Modules of it; all linear layers and convolutions by default.
    """
    return {name: layer.weight.abs() for name, layer in prunable_layers(model, layers).items()}


def snip_scores(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    layers: Collection[nn.Module] | None = None,
    loss: Loss | None = None,
) -> Scores:
    """Connection sensitivity ``|w g|`` with ``g`` the gradient of the loss (Lee et al. 2019, SNIP).

    Normalizations use the statistics of each batch, and dropout is off. Nothing of the model changes.

    Args:
        model: Any module.
        batches: One batch or several, whose gradients are summed.
        layers: Modules of it; all linear layers and convolutions by default.
        loss: Of a batch; :func:`model_loss` unless given.

    Raises:
        ValueError: If there is no batch, or a loss is missing, NaN or infinite.
    """
    weights = _weights(model, layers)
    with _probing(model):
        gradients = _sum(_gradients(model, batches, weights, loss or model_loss))
    return {name: (w.detach() * g).abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp_scores(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    layers: Collection[nn.Module] | None = None,
    loss: Loss | None = None,
) -> Scores:
    r"""``w * (H g)``, with ``g`` the gradient of the loss and ``H`` its Hessian (Wang et al. 2020, GraSP).

    To first order, removing a weight changes the squared norm of the gradient, which is how fast the loss falls, by
    ``-2 w (H g)``. Wang et al. remove the weights for which ``-w (H g)`` is highest, so those with the lowest score
    here. ``g`` is summed over all batches in a first pass, ``H g`` in a second one; both are those of the chosen
    weights, with normalizations and dropout as in :func:`snip_scores`.

    Args:
        model: Any module.
        batches: One batch or several.
        layers: Modules of it; all linear layers and convolutions by default.
        loss: Of a batch; :func:`tempered_loss` unless given.

    Raises:
        ValueError: If there is no batch, or a loss is missing, NaN or infinite.
    """
    weights = _weights(model, layers)
    gradients_of = functools.partial(_gradients, model, batches, weights, loss or tempered_loss)
    with _probing(model):
        total = _sum(gradients_of())
        flows = (_dot(total, gradients) for gradients in gradients_of(create_graph=True))
        products = _sum(torch.autograd.grad(flow, list(weights.values())) for flow in flows)
    return {name: w.detach() * Hg for (name, w), Hg in zip(weights.items(), products, strict=True)}


def _weights(model: nn.Module, layers: Collection[nn.Module] | None) -> dict[str, nn.Parameter]:
    return {name: layer.weight for name, layer in prunable_layers(model, layers).items()}


def _gradients(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    weights: Mapping[str, nn.Parameter],
    loss: Loss,
    *,
    create_graph: bool = False,
) -> Iterator[tuple[Tensor, ...]]:
    """The gradients of each batch, one after the other."""
    batches = [batches] if isinstance(batches, Mapping) else batches
    if not batches:
        raise ValueError("there are no batches, and without data there are no gradients to score weights by")
    device = next(iter(weights.values())).device
    for batch in batches:
        value = loss(model, {name: entry.to(device) for name, entry in batch.items()})
        if value is None or not value.isfinite():
            raise ValueError(f"the loss of a batch with {', '.join(batch)} is {value}; weights cannot be scored by it")
        yield torch.autograd.grad(value, list(weights.values()), create_graph=create_graph)


def _sum(gradients: Iterable[Sequence[Tensor]]) -> Sequence[Tensor]:
    return functools.reduce(lambda total, more: [a + b for a, b in zip(total, more, strict=True)], gradients)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Normalization by the statistics of a batch and no dropout; modes and buffers are put back at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    for module in modes:
        module.training = isinstance(module, _BatchNorm)
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers.items():
            buffer.copy_(before)
