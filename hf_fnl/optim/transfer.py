"""Optimizers that go on with a model whose weights were factorized."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_fnl.layers import Factorized

# State that is linear in the gradients, and state that is linear in their squares.
_LINEAR = frozenset({"exp_avg", "momentum_buffer"})
_SQUARED = frozenset({"exp_avg_sq", "max_exp_avg_sq"})
_UNDERSTOOD = _LINEAR | _SQUARED | {"step"}


class _Source(NamedTuple):
    """A parameter as it is, the former one in whose place it is, and the layer of which it is a factor."""

    name: str
    parameter: nn.Parameter
    former: Tensor | None
    layer: Factorized | None


@torch.no_grad()
def transfer_(
    optimizer: Optimizer, before: Mapping[str, Tensor], model: nn.Module, *, target: Optimizer | None = None
) -> None:
    r"""Let an optimizer go on with a model in which, in place, weights ``W`` became products ``U V^T``.

    With ``G`` the gradient for ``W``, those for the factors are ``G V`` and ``G^T U``; see :func:`factor_states` for
    what that makes of the state. Parameters that kept their name and shape keep their state. All others, as the weights
    of heads that were cut, start with fresh state.

    Args:
        optimizer: Any torch optimizer over the parameters ``before``, or what accelerate made of it.
        before: ``dict(model.named_parameters(remove_duplicate=False))`` from before the change.
        model: The model as it is now.
        target: Another optimizer, over the parameters as they are now, that takes the state over; it needs the state of
            ``optimizer``'s class. By default ``optimizer`` itself goes on: in its groups, whose options stay, factors
            take the place of their weight.

    Raises:
        ValueError: If, without ``target``, a trainable parameter is neither a factor of a former weight nor has the
            name of a former parameter, so that its group is not known.

    Warns:
        UserWarning: If the optimizer keeps state of which nothing is known here. Factors then start with fresh state.
    """
    sources = _sources(before, model)
    held = [(source, optimizer.state.get(source.former, {})) for source in sources if source.former is not None]
    unknown = sorted({key for source, state in held if source.layer for key in state} - _UNDERSTOOD)
    if unknown:
        warnings.warn(
            f"the state {', '.join(unknown)} of the optimizer has no known counterpart for factors, which start with "
            f"fresh state; what is known are {', '.join(sorted(_UNDERSTOOD))}",
            stacklevel=2,
        )
    moved: dict[Tensor, dict[str, Any]] = {}
    for (_, parameter, former, layer), state in held:
        if not state or former is None or parameter in moved:
            continue
        if layer is None and former.shape == parameter.shape:
            moved[parameter] = dict(state)
        elif layer is not None and former.shape == layer.dense_shape and not unknown:
            moved |= factor_states(layer, state)
    if target is None:
        _regroup(optimizer, before, sources)
    (target or optimizer).state.update(moved)


def factor_states(layer: Factorized, state: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    r"""Return the state of factors from the state of the dense weight in whose place they are.

    - ``exp_avg``, ``momentum_buffer``: a sum ``M`` of gradients for ``W`` becomes ``M V`` and ``M^T U``, the same sum
      of what the gradients for the factors, as they are now, would have been: exact. Coupled weight decay is in this
      sum as a gradient, and becomes that of ``||W||_F^2 / 2``.
    - ``exp_avg_sq``, ``max_exp_avg_sq``: sums ``S`` of squares become ``S (V * V)`` and ``S^T (U * U)``. An estimate:
      the value if the entries of a gradient were uncorrelated. Starting from zero instead would make huge steps, for
      ``step`` is no longer small and nothing corrects the bias.
    - ``step`` is copied.

    Kernels, transposed weights and a middle factor, which is the identity that it starts as, are treated likewise.
    """
    states: dict[Tensor, dict[str, Any]] = {factor: {} for factor in layer.factors()}
    for key, value in state.items():
        pulls = key in _LINEAR | _SQUARED
        values = (
            _pulled_back(layer, value, squared=key in _SQUARED) if pulls else [copy.deepcopy(value) for _ in states]
        )
        for factor_state, factor_value in zip(states.values(), values, strict=True):
            factor_state[key] = factor_value
    return states


def _pulled_back(layer: Factorized, value: Tensor, *, squared: bool) -> tuple[Tensor, ...]:
    """Return ``value``, a gradient for the dense weight, as one for the factors, or for their squares."""
    probe = copy.deepcopy(layer).requires_grad_()
    if squared:
        probe.set_factors_(tuple(factor.square() for factor in layer.factors()))
    with torch.enable_grad():
        gradients = torch.autograd.grad(probe.dense_weight(), probe.factors(), value)
    return tuple(gradient.contiguous() for gradient in gradients)


def _sources(before: Mapping[str, Tensor], model: nn.Module) -> list[_Source]:
    layers = {
        factor: (f"{path}.weight", layer)
        for path, layer in model.named_modules()
        if isinstance(layer, Factorized)
        for factor in layer.factors()
    }
    sources = []
    for name, parameter in model.named_parameters():
        weight, layer = layers.get(parameter, ("", None))
        is_new = name not in before and weight in before
        sources.append(_Source(name, parameter, before.get(weight if is_new else name), layer if is_new else None))
    return sources


def _regroup(optimizer: Optimizer, before: Mapping[str, Tensor], sources: list[_Source]) -> None:
    """Put parameters into the places of those from which they come, which lose their state."""
    new: dict[Tensor, list[tuple[str, Tensor]]] = {former: [] for former in before.values()}
    for name, parameter, former, _ in sources:
        if former is not None:
            new[former].append((name, parameter))
        elif parameter.requires_grad:
            raise ValueError(
                f"{name} comes from no parameter that the optimizer has; pass the optimizer for the model as it is now "
                "as target"
            )
    for group in optimizer.param_groups:
        old = zip(group.get("param_names", [""] * len(group["params"])), group["params"], strict=True)
        pairs = [pair for name, parameter in old for pair in new.get(parameter, [(name, parameter)])]
        group["params"] = [parameter for _, parameter in pairs]
        if "param_names" in group:
            group["param_names"] = [name for name, _ in pairs]
    for former in before.values():
        optimizer.state.pop(former, None)
