"""Other ways to cut a linear layer with data, all layers to one share: plain SVD, ASVD's scaling, SVD-LLM's whitening.

What they keep is multiplied out in place, since only their errors are of interest here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

METHODS = ("plain", "asvd", "whitening")


@torch.no_grad()
def cut_(
    layers: Mapping[str, nn.Linear], model: nn.Module, batches: Iterable[Tensor], share: float, method: str
) -> dict[str, int]:
    """Cut layers to a share of their parameters each, as the dense model's inputs say, and return the ranks.

    ASVD (Yuan et al. 2023) scales columns by the root of the mean absolute input; SVD-LLM (Wang et al. 2024) multiplies
    by the Cholesky factor of the inputs' second moment, so that a singular value is the error of its loss.
    """
    metrics = {} if method == "plain" else _metrics(layers, model, batches, method)
    ranks = {}
    for name, layer in layers.items():
        ranks[name] = rank_of(layer.weight, share)
        metric = metrics.get(name, torch.eye(layer.weight.shape[1], dtype=torch.float64))
        U, S, Vt = torch.linalg.svd(layer.weight.double() @ metric, full_matrices=False)
        kept = U[:, : ranks[name]] * S[: ranks[name]] @ Vt[: ranks[name]]
        layer.weight.copy_(torch.linalg.solve(metric, kept, left=False))
    return ranks


def rank_of(weight: Tensor, share: float) -> int:
    """The rank at which two factors have a share of a matrix's parameters."""
    m, n = weight.shape
    return max(1, int(share * m * n / (m + n)))


def _metrics(
    layers: Mapping[str, nn.Linear], model: nn.Module, batches: Iterable[Tensor], method: str
) -> dict[str, Tensor]:
    """What each layer's weight is multiplied by before it is decomposed."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor) -> None:
        x = x.flatten(0, -2)
        seen = (x.mT @ x if method == "whitening" else x.abs().sum(0)).double()
        sums[name] = sums[name] + seen if name in sums else seen

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        for name, layer in layers.items()
    ]
    count = 0
    for ids in batches:
        count += ids.numel()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    if method == "asvd":
        return {name: (total / count).clamp(min=1e-6).sqrt().diag() for name, total in sums.items()}
    ridge = {name: 1e-6 * total.diagonal().mean() * torch.eye(len(total)) for name, total in sums.items()}
    return {name: torch.linalg.cholesky((total + ridge[name]) / count) for name, total in sums.items()}
