"""How many weights of a network stay, and in which of its layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from hf_fnl.vision.choose import choose_layers

CLASSIFIER_RATIO = 0.3  # Su et al. 2020: what the linear layer at the output keeps


def prunable_layers(model: nn.Module, layers: Collection[nn.Module] | None = None) -> dict[str, Any]:
    """The linear layers and two-dimensional convolutions that are meant, by name and in the order of the model.

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
    """How many weights stay so that the whole network has a share of its parameters.

    Biases, normalizations and all else that is not pruned count as parameters and stay. With the ``ratio`` of a
    low-rank network, the pruned one has as many parameters as that.

    Args:
        model: Before it is pruned.
        ratio: Share of all parameters.
        layers: The layers that are pruned, as :func:`prune_ <hf_fnl.vision.pruning.prune_>` takes them.

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
    r"""How many weights each layer keeps in a random ticket (Su et al. 2020, "smart ratios").

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
    """How many parameters a pruned model holds, whether or not its masks are still there.

    Zeros in matrices and kernels do not count. Vectors (biases, scales of normalizations), which are never pruned,
    count in full, whatever their values.

    Returns:
        ``nonzero``, ``total`` and ``ratio`` of the first to the second.
    """
    parameters = list(model.parameters())
    nonzero = sum(int(p.count_nonzero()) if p.ndim > 1 else p.numel() for p in parameters)
    total = sum(p.numel() for p in parameters)
    return {"nonzero": nonzero, "total": total, "ratio": nonzero / max(total, 1)}
