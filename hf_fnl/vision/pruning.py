"""Unstructured pruning in place: how many weights of each layer stay, by which scores, and the masks that hold them.

What is pruned stays zero through training and checkpoints: SNIP (Lee et al. 2019), GraSP (Wang et al. 2020), random
tickets (Su et al. 2020) and magnitude, which :mod:`hf_fnl.vision.lottery` repeats in rounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

METHODS = ("magnitude", "random", "snip", "grasp")
CLASSIFIER_RATIO = 0.3  # Su et al. 2020: what the linear layer at the output keeps
TEMPERATURE = 200.0  # Wang et al. 2020, their code: makes the outputs of a fresh network near uniform

Batch = Mapping[str, Tensor]
Tensors = dict[str, Tensor]  # by the name of the layer


def prune_(model: nn.Module, keep: int, *, method: str, batch: Batch | None = None) -> None:
    """Set weights of the linear layers and two-dimensional convolutions of a model to zero, and hold them there.

    Each has then, as :mod:`torch.nn.utils.prune` makes it, a parameter ``weight_orig`` and a buffer ``weight_mask``.
    What is pruned is zero in both and gets no gradient, so that decay and momentum leave it at zero, and norms of
    weights are those of what is left. To go on from a checkpoint of a pruned model, prune the new model to any number
    of weights first: the masks come with the checkpoint. :func:`finalize_` makes weights plain again.

    Args:
        model: Any module.
        keep: How many weights stay; :func:`weights_to_keep` turns a share of a network's parameters into it.
        method: ``"magnitude"``, ``"snip"`` or ``"grasp"``, by the highest score among all layers, or ``"random"``, with
            the numbers for each layer of :func:`smart_counts`.
        batch: Data for ``"snip"`` and ``"grasp"``: the keyword arguments of the model, ``labels`` among them.

    Raises:
        ValueError: If ``keep`` or ``method`` is not allowed, there is no layer to prune or no batch where one is
            needed, or a score is not finite.
    """
    apply_masks_(model, choose_masks(model, keep, method=method, batch=batch))


def choose_masks(model: nn.Module, keep: int, *, method: str, batch: Batch | None = None) -> Tensors:
    """Return the masks that :func:`prune_` would apply, true where a weight stays."""
    layers = prunable_layers(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    if not 1 <= keep <= total:
        raise ValueError(f"keep must be in [1, {total}], the number of weights of the layers, got {keep}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "random":
        return _random_masks(layers, keep)
    if method == "magnitude":
        return _highest({name: layer.weight.detach().abs() for name, layer in layers.items()}, keep)
    if batch is None:
        raise ValueError(f"method={method!r} needs a batch: without data there are no gradients to score weights by")
    return _highest((snip_scores if method == "snip" else grasp_scores)(model, batch), keep)


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune layers that are not pruned yet, in place, to masks by the name of the layer; see :func:`prune_`."""
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        layer.get_parameter("weight").mul_(mask)
        prune.custom_from_mask(layer, "weight", mask)


def finalize_(model: nn.Module) -> None:
    """Make the weights of pruned layers plain parameters again, in place, with zeros where they were pruned.

    What :meth:`save_pretrained` writes is then a stock checkpoint.
    """
    for layer in model.modules():
        if "weight_mask" in dict(layer.named_buffers(recurse=False)):
            prune.remove(layer, "weight")


def prunable_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers and two-dimensional convolutions of a model, by name and in their order.

    Raises:
        ValueError: If there is none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers or two-dimensional convolutions")
    return layers


def weights_to_keep(model: nn.Module, ratio: float) -> int:
    """Return how many weights stay so that the network has a share of its parameters.

    Biases, normalizations and all else that is not pruned count as parameters and stay. With the ``ratio`` of a
    low-rank network, the pruned one has as many parameters as that.

    Raises:
        ValueError: If no number of weights makes that share.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    prunable = sum(layer.weight.numel() for layer in prunable_layers(model).values())
    fixed = total - prunable
    keep = round(ratio * total) - fixed
    if not 1 <= keep <= prunable:
        raise ValueError(
            f"ratio must be in [{(fixed + 1) / total:.4g}, 1], for {fixed:,} of {total:,} parameters are not in the "
            f"weights to be pruned and stay; got {ratio}"
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


def snip_scores(model: nn.Module, batch: Batch) -> Tensors:
    """Return the connection sensitivity ``|w g|`` with ``g`` the gradient of the loss (Lee et al. 2019, SNIP).

    Normalizations use the statistics of the batch, and dropout is off. Nothing of the model changes.
    """
    probe, weights = _probe(model)
    with torch.enable_grad():
        gradients = torch.autograd.grad(probe(**batch).loss, list(weights.values()))
    return {name: (w.detach() * g).abs() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp_scores(model: nn.Module, batch: Batch) -> Tensors:
    r"""Return ``w * (H g)``, with ``g`` the gradient of the loss and ``H`` its Hessian (Wang et al. 2020, GraSP).

    The loss is the cross-entropy of the logits, divided by a temperature of 200. To first order, removing a weight
    changes the squared norm of the gradient, which is how fast the loss falls, by ``-2 w (H g)``. Wang et al. remove
    the weights for which ``-w (H g)`` is highest, so those with the lowest score here. Normalizations and dropout are
    as in :func:`snip_scores`.
    """
    probe, weights = _probe(model)
    with torch.enable_grad():
        loss = F.cross_entropy(probe(**batch).logits / TEMPERATURE, batch["labels"])
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        flow = torch.stack([(g * g.detach()).sum() for g in gradients]).sum()
        products = torch.autograd.grad(flow, list(weights.values()))
    return {name: w.detach() * Hg for (name, w), Hg in zip(weights.items(), products, strict=True)}


def _probe(model: nn.Module) -> tuple[nn.Module, Tensors]:
    """Return a copy that normalizes by the statistics of a batch and drops nothing, and its weights by layer."""
    probe = copy.deepcopy(model)
    for module in probe.modules():
        module.training = isinstance(module, _BatchNorm)
    return probe, {name: layer.weight for name, layer in prunable_layers(probe).items()}


def _highest(scores: Mapping[str, Tensor], keep: int) -> Tensors:
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"the scores of {name} hold NaN or Inf")
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(keep, sorted=False).indices] = True
    parts: Sequence[Tensor] = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _random_masks(layers: Mapping[str, nn.Module], keep: int) -> Tensors:
    masks: Tensors = {}
    for name, count in smart_counts(layers, keep).items():
        weight = layers[name].get_parameter("weight")
        chosen = torch.randperm(weight.numel())[:count]
        mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        masks[name] = mask.view(weight.shape).to(weight.device)
    return masks
