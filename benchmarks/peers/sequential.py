"""Other ways to cut a decoder block by block, all layers to one share, by the inputs that the cut model makes.

``sequential`` whitens by these inputs ``x``, ``anchored`` is AA-SVD's two-sided least squares: it fits the outputs that
the dense layer gives for its own inputs ``z``. What they keep is multiplied out in place.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.svd import rank_of

METHODS = ("sequential", "anchored")
_RIDGE = 1e-5  # share of the mean square of the inputs that is added to each


class _FirstBlockReached(Exception):
    pass


@torch.no_grad()
def cut_(
    layers: Mapping[str, nn.Linear], model: nn.Module, batches: Iterable[Tensor], share: float, method: str
) -> dict[str, int]:
    """Cut the layers of ``model.model.layers`` to a share of their parameters each, and return the ranks."""
    names = {layer: name for name, layer in layers.items()}
    ranks = {}
    calls = _calls_of_first_block(model, batches)
    cut = dense = [hidden for hidden, _ in calls]
    options = [kwargs for _, kwargs in calls]
    for block in model.model.layers:
        original = copy.deepcopy(block)
        own = dict(zip(original.modules(), block.modules(), strict=True))
        dense, seen = _run(original, dense, options, [each for each, ours in own.items() if ours in names])
        targets = {own[layer]: inputs for layer, inputs in seen.items()}
        for together in _with_same_input(targets):
            _, inputs = _run(block, cut, options, together)
            for layer in together:
                ranks[names[layer]] = rank = rank_of(layer.weight, share)
                x = inputs[layer]
                z = targets[layer] if method == "anchored" else x
                layer.weight.copy_(fitted(layer.weight.double(), z, x, rank))
        cut, _ = _run(block, cut, options, [])
    return ranks


def fitted(weight: Tensor, z: Sequence[Tensor], x: Sequence[Tensor], rank: int) -> Tensor:
    r"""The matrix ``B`` of a rank with the least ``sum ||W z - B x||^2``, for vectors in the last dimension.

    Without the limit it is ``B = W E[z x^T] E[x x^T]^{-1}``; the limited one is nearest to that in the metric of ``x``.
    """
    second, cross = _sum_of_products(x, x), _sum_of_products(z, x)
    ridge = _RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    root = torch.linalg.cholesky(second + ridge)
    best = torch.cholesky_solve((weight @ (cross + ridge)).mT, root).mT
    P = torch.linalg.svd(best @ root, full_matrices=False).U[:, :rank]
    return P @ P.mT @ best


def _sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Any:
    return sum((a.flatten(0, -2).mT @ b.flatten(0, -2)).double() for a, b in zip(left, right, strict=True))


def _calls_of_first_block(model: nn.Module, batches: Iterable[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    calls = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))
        raise _FirstBlockReached

    hook = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    for ids in batches:
        with contextlib.suppress(_FirstBlockReached):
            model(input_ids=ids, use_cache=False)
    hook.remove()
    return calls


def _run(
    block: nn.Module, states: Sequence[Tensor], options: Sequence[dict[str, Any]], layers: Sequence[nn.Module]
) -> tuple[list[Tensor], dict[nn.Module, list[Tensor]]]:
    """Outputs of a block, and inputs of some of its layers, batch by batch."""
    inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    hooks = [layer.register_forward_pre_hook(lambda module, args: inputs[module].append(args[0])) for layer in layers]
    outputs = [block(hidden, **kwargs) for hidden, kwargs in zip(states, options, strict=True)]
    for hook in hooks:
        hook.remove()
    return outputs, inputs


def _with_same_input(inputs: Mapping[nn.Module, list[Tensor]]) -> list[list[Any]]:
    """Layers in groups that are given the same tensor, in the order in which they run."""
    groups: dict[int, list[nn.Module]] = {}
    for layer, (first, *_) in inputs.items():
        groups.setdefault(first.data_ptr(), []).append(layer)
    return list(groups.values())
