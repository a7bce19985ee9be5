"""Masks that hold a part of the weights at zero, through training and checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from hf_fnl.vision.pruning.counts import prunable_layers, smart_counts
from hf_fnl.vision.pruning.scores import Batch, Loss, grasp_scores, magnitude_scores, snip_scores

METHODS = ("magnitude", "random", "snip", "grasp")

Masks = dict[str, Tensor]


@dataclass(frozen=True)
class PruningResult:
    """What pruning did to a model.

    Args:
        layers: Name of each pruned layer, with how many of its weights stay and how many there are.
    """

    layers: Mapping[str, tuple[int, int]]

    @property
    def kept(self) -> int:
        """Weights that stay."""
        return sum(kept for kept, _ in self.layers.values())

    @property
    def total(self) -> int:
        """Weights of the layers that were pruned."""
        return sum(size for _, size in self.layers.values())

    def __str__(self) -> str:
        head = f"{self.kept:,} of {self.total:,} weights kept ({self.kept / self.total:.1%})"
        return "\n  ".join([head, *(f"{name}: {kept:,} of {size:,}" for name, (kept, size) in self.layers.items())])


def prune_(
    model: nn.Module,
    keep: int,
    *,
    method: str,
    layers: Collection[nn.Module] | None = None,
    batches: Batch | Sequence[Batch] = (),
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
) -> PruningResult:
    """Set weights of a model to zero, in place, and hold them there.

    Each pruned layer has, as :mod:`torch.nn.utils.prune` makes it, a parameter ``weight_orig`` and a buffer
    ``weight_mask``. What is pruned is zero in both and gets no gradient, so that decay and momentum leave it at zero,
    and norms of weights are those of what is left. To go on from a checkpoint of a pruned model, prune the new model to
    any number of weights in the same layers first: the masks come with the checkpoint. :func:`finalize_` makes weights
    plain again.

    Args:
        model: Any module.
        keep: How many weights of the chosen layers stay; :func:`~hf_fnl.vision.pruning.weights_to_keep` turns a
            share of a network's parameters into it.
        method: ``"magnitude"``, ``"snip"`` or ``"grasp"``, by the highest score among all layers, or ``"random"``, with
            the numbers for each layer of :func:`~hf_fnl.vision.pruning.smart_counts`.
        layers: Modules of the model; all linear layers and two-dimensional convolutions by default.
        batches: Data for ``"snip"`` and ``"grasp"``, one batch or several.
        loss: How the loss of a batch is computed, for these two.
        generator: Draws the random masks; torch's own by default.

    Raises:
        ValueError: If ``keep`` or ``method`` is not allowed, there is no layer to prune or no batch where one is
            needed, a layer is pruned already, or a score or loss is not finite.
    """
    chosen = choose_masks(model, keep, method=method, layers=layers, batches=batches, loss=loss, generator=generator)
    return apply_masks_(model, chosen)


def choose_masks(
    model: nn.Module,
    keep: int,
    *,
    method: str,
    layers: Collection[nn.Module] | None = None,
    batches: Batch | Sequence[Batch] = (),
    loss: Loss | None = None,
    generator: torch.Generator | None = None,
) -> Masks:
    """The masks that :func:`prune_` would apply, true where a weight stays, by the name of the layer."""
    chosen = prunable_layers(model, layers)
    total = sum(layer.weight.numel() for layer in chosen.values())
    if not 1 <= keep <= total:
        raise ValueError(f"keep must be in [1, {total}], the number of weights of the chosen layers, got {keep}")
    if method == "random":
        return _random_masks(chosen, keep, generator)
    if method == "magnitude":
        return _highest(magnitude_scores(model, layers=layers), keep)
    if method == "snip":
        return _highest(snip_scores(model, batches, layers=layers, loss=loss), keep)
    if method == "grasp":
        return _highest(grasp_scores(model, batches, layers=layers, loss=loss), keep)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> PruningResult:
    """Prune a model, in place, to given masks; see :func:`prune_`.

    Args:
        model: A model whose layers are not pruned yet.
        masks: For the name of each layer a mask in the shape of its weight, true where a weight stays.
    """
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        layer.get_parameter("weight").mul_(mask)
        prune.custom_from_mask(layer, "weight", mask)
    return PruningResult({name: (int(mask.sum()), mask.numel()) for name, mask in masks.items()})


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


def _highest(scores: Mapping[str, Tensor], keep: int) -> Masks:
    for name, score in scores.items():
        if not score.isfinite().all():
            raise ValueError(f"the scores of {name} hold NaN or Inf")
    flat = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(keep, sorted=False).indices] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def _random_masks(layers: Mapping[str, nn.Module], keep: int, generator: torch.Generator | None) -> Masks:
    masks: Masks = {}
    for name, count in smart_counts(layers, keep).items():
        weight = layers[name].get_parameter("weight")
        chosen = torch.randperm(weight.numel(), generator=generator)[:count]
        mask = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, chosen, True)
        masks[name] = mask.view(weight.shape).to(weight.device)
    return masks
