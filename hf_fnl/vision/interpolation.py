"""The straight line between two networks of the same form, and the loss on it (Kamalakara et al. 2022, Sec. 4.3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

INTERPOLATION_FILE = "interpolation.json"

State = Mapping[str, Tensor]


def interpolate(baseline: State, other: State, t: float) -> dict[str, Tensor]:
    r"""Return the network at ``t`` on the line: ``theta = (1 - t) theta_b + t theta_l``.

    Running statistics of BatchNorm are interpolated as the weights are. Integers, such as its count of batches,
    are those of the nearer end.

    Args:
        baseline: State ``theta_b`` of the network at ``t = 0``.
        other: State ``theta_l`` of that at ``t = 1``, with its factors multiplied out.
        t: Where on the line, in ``[0, 1]``.

    Raises:
        ValueError: If ``t`` is not in ``[0, 1]``, or the states differ in names or shapes.
    """
    if not 0 <= t <= 1:
        raise ValueError(f"t must be in [0, 1], got {t}")
    _check_alike(baseline, other)
    return {name: _between(tensor, other[name], t) for name, tensor in baseline.items()}


@torch.no_grad()
def loss_along_line(
    baseline: nn.Module,
    other: nn.Module,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    *,
    steps: int = 11,
    batches: Iterable[Tensor] | None = None,
) -> list[dict[str, float]]:
    """Evaluate the networks at evenly spaced points of the line between two.

    Args:
        baseline: The network at ``t = 0``; left as it is, like the other one.
        other: The network at ``t = 1``, with its factors multiplied out.
        evaluate: Called with each network, in evaluation mode and without gradients; returns its figures.
        steps: Points, both ends among them; 11 in K22.
        batches: Images by which BatchNorm's statistics are estimated anew at every point. Between two networks
            interpolated statistics are not those of the interpolated weights, and the loss shows it. Iterated once a
            point, so a list or a data loader.

    Returns:
        For each point ``t`` and what ``evaluate`` returned.

    Raises:
        ValueError: If there are fewer than two steps, the networks differ in form.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, for the two ends of the line; got {steps}")
    states = baseline.state_dict(), other.state_dict()
    network = copy.deepcopy(baseline).eval()
    points = []
    for t in (step / (steps - 1) for step in range(steps)):
        network.load_state_dict(interpolate(*states, t))
        if batches is not None:
            update_bn(batches, network)
        points.append({"t": t, **evaluate(network)})
    return points


def _between(start: Tensor, end: Tensor, t: float) -> Tensor:
    if start.is_floating_point():
        return torch.lerp(start, end.to(start), t)
    return start if t < 0.5 else end


def _check_alike(baseline: State, other: State) -> None:
    for name in sorted(baseline.keys() | other.keys()):
        here, there = (tuple(state[name].shape) if name in state else None for state in (baseline, other))
        if here != there:
            raise ValueError(
                f"{name} is {here} in the baseline and {there} in the other network: a line joins networks of the same "
                "form, so multiply the factors of both out first"
            )
