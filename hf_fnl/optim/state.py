"""Checks of LAMB's options, and that gradients and states fit their parameters, before anything is written.

torch's fused kernels take the sizes of all tensors from the parameters: what does not fit would be read past its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_fnl.optim.sharding import names_of, to_local

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_REMEDY = (
    "load the state that belongs to this parameter, or build the optimizer anew; after a model was cast or moved, "
    "optimizer.load_state_dict(optimizer.state_dict()) brings the state to its parameters"
)


def check_parameter(name: str, parameter: Tensor) -> None:
    """Raise a ``RuntimeError`` for a sparse gradient, a ``ValueError`` for one that is not like its parameter."""
    gradient: Any = parameter.grad
    if gradient.layout is not torch.strided:
        raise RuntimeError(
            f"Lamb takes dense gradients only, got a {gradient.layout} one for {name} of shape "
            f"{tuple(parameter.shape)}; build the embedding that makes it with sparse=False"
        )
    if parameter.dtype not in _DTYPES:
        raise ValueError(f"{name} is of {parameter.dtype}; LAMB updates {', '.join(map(str, _DTYPES))}")
    if _form(gradient) != _form(parameter):
        raise ValueError(f"the gradient of {name} is {_shown(gradient)}, and the parameter {_shown(parameter)}")


def check_state(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless a state is a float32 ``step`` and contiguous moments like the parameter."""
    if state.keys() != {"step", *MOMENTS}:
        listed = ", ".join(map(str, state)) or "nothing"
        raise ValueError(f"the state of {name} holds {listed}, and LAMB's is step, {', '.join(MOMENTS)}; {_REMEDY}")
    form = _form(parameter)
    for key in MOMENTS:
        if _form(state[key]) != form or not state[key].is_contiguous():
            raise ValueError(
                f"{key} of {name} is {_shown(state[key])}, and LAMB's is contiguous and like the parameter, "
                f"{_shown(parameter)}; {_REMEDY}"
            )
    step, scalar = state["step"], torch.Size(())
    if _form(step) != (False, torch.float32, parameter.device, torch.strided, scalar, scalar):
        like = f"a torch.float32 tensor without dimensions on {parameter.device}"
        raise ValueError(f"step of {name} is {_shown(step)}, and LAMB's is {like}; {_REMEDY}")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless ``lr``, ``betas``, ``eps`` and ``weight_decay`` are there and in range."""
    if missing := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in options]:
        raise ValueError(f"a group of parameters for LAMB needs {', '.join(missing)}")
    lr, betas, eps, weight_decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not isinstance(value, int | float | Tensor) or value == math.inf:
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    are_two = isinstance(betas, Sequence) and len(betas) == 2
    if not are_two or not all(isinstance(beta, int | float | Tensor) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")


def check_loaded(groups: Iterable[Mapping[str, Any]], loaded: Mapping[str, Any]) -> None:
    """Check ``param_groups`` and ``state`` that are to be loaded, and bring states to the devices of the parameters.

    Raises:
        ValueError: If an option, a name or a state is not one of these parameters; nothing has changed then.
    """
    for group, other in zip(groups, loaded["param_groups"], strict=False):
        pairs = zip(group.get("param_names", ()), other.get("param_names", ()), strict=False)
        if differ := next((pair for pair in pairs if pair[0] != pair[1]), None):
            raise ValueError(f"the state to load has {differ[1]} in the place of {differ[0]}: its order is another")
    fitting: dict[Tensor, dict[str, Any]] = {}
    for number, group in enumerate(loaded["param_groups"]):
        check_options(group)
        for name, parameter in zip(names_of(group, number), group["params"], strict=False):
            if state := loaded["state"].get(parameter):
                fitting[parameter] = {key: _as_kept(key, value, parameter) for key, value in state.items()}
                check_state(name, parameter, fitting[parameter])
    for parameter, state in fitting.items():
        loaded["state"][parameter].update(state)


def _as_kept(key: str, value: Any, parameter: Tensor) -> Any:
    """Return a loaded state on the device, and in the order in memory, of one that is kept."""
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device) if key == "step" else value.contiguous()


def _form(value: Any) -> tuple[Any, ...] | None:
    """Return dtype, device and shape of a tensor and the shape of what is held here; ``None`` for what is no tensor."""
    if not isinstance(value, Tensor):
        return None
    return isinstance(value, DTensor), value.dtype, value.device, value.layout, value.shape, to_local(value).shape


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r} of type {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
