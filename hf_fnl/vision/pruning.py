"""Unstructured pruning in place: how many weights of each layer stay, by which scores, and the masks that hold them.

What is pruned stays zero through training and checkpoints: SNIP (Lee et al. 2019), GraSP (Wang et al. 2020), random
tickets (Su et al. 2020) and magnitude, which :mod:`hf_fnl.vision.lottery` repeats in rounds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from hf_fnl.vision.choose import choose_layers

METHODS = ("magnitude", "random", "snip", "grasp")
CLASSIFIER_RATIO = 0.3  # Su et al. 2020: what the linear layer at the output keeps
TEMPERATURE = 200.0  # Wang et al. 2020, their code: makes the outputs of a fresh network near uniform

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
Scores = dict[str, Tensor]
Masks = dict[str, Tensor]


def prune_(
    model: nn.Module,
    keep: int,
    *,
    method: str,
    layers: Collection[nn.Module] | None = None,
    batches: Batch | Sequence[Batch] = (),
    loss: Loss | None = None,
) -> dict[str, tuple[int, int]]:
    """Set weights of a model to zero, in place, and hold them there.

    Each pruned layer has, as :mod:`torch.nn.utils.prune` makes it, a parameter ``weight_orig`` and a buffer
    ``weight_mask``. What is pruned is zero in both and gets no gradient, so that decay and momentum leave it at zero,
    and norms of weights are those of what is left. To go on from a checkpoint of a pruned model, prune the new model to
    any number of weights in the same layers first: the masks come with the checkpoint. :func:`finalize_` makes weights
    plain again.

    Args:
        model: Any module.
        keep: How many weights of the chosen layers stay; :func:`weights_to_keep` turns a share of a network's
            parameters into it.
        method: ``"magnitude"``, ``"snip"`` or ``"grasp"``, by the highest score among all layers, or ``"random"``, with
            the numbers for each layer of :func:`smart_counts`.
        layers: Modules of the model; all linear layers and two-dimensional convolutions by default.
        batches: Data for ``"snip"`` and ``"grasp"``, one batch or several.
        loss: How the loss of a batch is computed, for these two.

    Returns:
        By the name of each pruned layer how many of its weights stay, and how many there are.

    Raises:
        ValueError: If ``keep`` or ``method`` is not allowed, there is no layer to prune or no batch where one is
            needed, a layer is pruned already, or a score or loss is not finite.
    """
    return apply_masks_(model, choose_masks(model, keep, method=method, layers=layers, batches=batches, loss=loss))


def choose_masks(
    model: nn.Module,
    keep: int,
    *,
    method: str,
    layers: Collection[nn.Module] | None = None,
    batches: Batch | Sequence[Batch] = (),
    loss: Loss | None = None,
) -> Masks:
    """Return the masks that :func:`prune_` would apply, true where a weight stays, by the name of the layer."""
    chosen = prunable_layers(model, layers)
    total = sum(layer.weight.numel() for layer in chosen.values())
    if not 1 <= keep <= total:
        raise ValueError(f"keep must be in [1, {total}], the number of weights of the chosen layers, got {keep}")
    if method == "random":
        return _random_masks(chosen, keep)
    if method == "magnitude":
        return _highest(magnitude_scores(model, layers=layers), keep)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    scores = snip_scores if method == "snip" else grasp_scores
    return _highest(scores(model, batches, layers=layers, loss=loss), keep)


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Prune layers that are not pruned yet, in place, to masks by the name of the layer; see :func:`prune_`."""
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        layer.get_parameter("weight").mul_(mask)
        prune.custom_from_mask(layer, "weight", mask)
    return {name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()}


def finalize_(model: nn.Module) -> list[str]:
    """Make the weights of pruned layers plain parameters again, in place, with zeros where they were pruned.

    What :meth:`save_pretrained` writes is then a stock checkpoint.

    Returns:
        Names of the layers that were pruned.

    Raises:
        ValueError: If there is none.
    """
    pruned = {name: m for name, m in model.named_modules() if "weight_mask" in dict(m.named_buffers(recurse=False))}
    if not pruned:
        raise ValueError(f"{type(model).__name__} has no pruned layer")
    for layer in pruned.values():
        prune.remove(layer, "weight")
    return list(pruned)


def prunable_layers(model: nn.Module, layers: Collection[nn.Module] | None = None) -> dict[str, Any]:
    """Return the linear layers and two-dimensional convolutions that are meant, by name and in the order of the model.

    Args:
        model: Any module.
        layers: Modules of the model; ``None`` for all such layers.

    Raises:
        ValueError: If there is none, one of ``layers`` is no such layer of the model, or a weight is tied, pruned or
            parametrized.
    """
    return choose_layers(
        model,
        layers,
        fits=lambda module: isinstance(module, nn.Linear | nn.Conv2d),
        wanted="linear layers or two-dimensional convolutions",
    )


def weights_to_keep(model: nn.Module, ratio: float, *, layers: Collection[nn.Module] | None = None) -> int:
    """Return how many weights stay so that the network has a share of its parameters.

    Biases, normalizations and all else that is not pruned count as parameters and stay. With the ``ratio`` of a
    low-rank network, the pruned one has as many parameters as that.

    Args:
        model: Before it is pruned.
        ratio: Share of all parameters.
        layers: The layers that are pruned, as :func:`prune_` takes them.

    Raises:
        ValueError: If no number of weights makes that share.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(layer.weight.numel() for layer in prunable_layers(model, layers).values())
    fixed = total - prunable
    keep = round(ratio * total) - fixed
    if not 1 <= keep <= prunable:
        closest = min(max(ratio, (fixed + 1) / total), 1.0)
        raise ValueError(
            f"ratio={ratio} of {total:,} parameters cannot be met: {fixed:,} are not in the weights to be pruned and "
            f"stay; the closest that can is {closest}"
        )
    return keep


def smart_counts(layers: Mapping[str, nn.Module], keep: int) -> dict[str, int]:
    r"""Return how many weights each layer keeps in a random ticket (Su et al. 2020, "smart ratios").

    Of the ``k``-th layer from the output a share in proportion to ``k^2 + k`` stays, at most all of it; the last layer,
    where it is linear, keeps 30 %, or more where the others are full. (For VGG the authors divide the shares by the
    square of the position from the input, which is not done here.)

    Args:
        layers: The layers in the order of the network.
        keep: Number of weights that stay in all of them.

    Returns:
        Numbers that sum to ``keep``.

    Raises:
        ValueError: If the last layer alone would keep more than that.
    """
    sizes = {name: layer.get_parameter("weight").numel() for name, layer in layers.items()}
    factors = {name: k * k + k for k, name in enumerate(reversed(sizes), start=1)}
    counts: dict[str, int] = {}
    last = list(layers)[-1]
    if isinstance(layers[last], nn.Linear):
        size = sizes.pop(last)
        counts[last] = max(round(CLASSIFIER_RATIO * size), keep - sum(sizes.values()))
        if counts[last] > keep:
            raise ValueError(f"method='random' keeps {counts[last]:,} weights of {last} alone, more than keep={keep:,}")
    while sizes:
        scale = (keep - sum(counts.values())) / sum(factors[name] * size for name, size in sizes.items())
        full = {name: size for name, size in sizes.items() if scale * factors[name] >= 1}
        if not full:
            break
        counts |= full
        sizes = {name: size for name, size in sizes.items() if name not in full}
    shares = {name: scale * factors[name] * size for name, size in sizes.items()}
    counts |= {name: math.floor(share) for name, share in shares.items()}
    left = keep - sum(counts.values())
    for name in sorted(shares, key=lambda name: counts[name] - shares[name])[:left]:
        counts[name] += 1
    return {name: counts[name] for name in layers}


def sparsity(model: nn.Module) -> dict[str, float]:
    """Return how many parameters a pruned model holds, whether or not its masks are still there.

    Zeros in matrices and kernels do not count. Vectors (biases, scales of normalizations), which are never pruned,
    count in full, whatever their values.

    Returns:
        ``nonzero``, ``total`` and ``ratio`` of the first to the second.
    """
    parameters = list(model.parameters())
    nonzero = sum(int(p.count_nonzero()) if p.ndim > 1 else p.numel() for p in parameters)
    total = sum(p.numel() for p in parameters)
    return {"nonzero": nonzero, "total": total, "ratio": nonzero / max(total, 1)}


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that a model of Transformers returns for a batch with labels."""
    return model(**batch).loss


def tempered_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of the logits, divided by a temperature of 200, against the ``labels`` of a batch."""
    return F.cross_entropy(model(**batch).logits / TEMPERATURE, batch["labels"])


@torch.no_grad()
def magnitude_scores(model: nn.Module, *, layers: Collection[nn.Module] | None = None) -> Scores:
    """Return ``|w|`` of every weight of the chosen layers, by the name of the layer."""
    return {name: layer.weight.abs() for name, layer in prunable_layers(model, layers).items()}


def snip_scores(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    layers: Collection[nn.Module] | None = None,
    loss: Loss | None = None,
) -> Scores:
    """Return the connection sensitivity ``|w g|`` with ``g`` the gradient of the loss (Lee et al. 2019, SNIP).

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
    r"""Return ``w * (H g)``, with ``g`` the gradient of the loss and ``H`` its Hessian (Wang et al. 2020, GraSP).

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


def _highest(scores: Mapping[str, Tensor], keep: int) -> Masks:
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"the scores of {name} hold NaN or Inf")
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(keep, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _random_masks(layers: Mapping[str, nn.Module], keep: int) -> Masks:
    masks: Masks = {}
    for name, count in smart_counts(layers, keep).items():
        weight = layers[name].get_parameter("weight")
        chosen = torch.randperm(weight.numel())[:count]
        mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        masks[name] = mask.view(weight.shape).to(weight.device)
    return masks


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
    """Yield the gradients of each batch, one after the other."""
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
    """Normalize by the statistics of a batch and drop nothing; modes and buffers are put back at the end."""
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
