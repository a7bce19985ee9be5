"""Parameters that are divided among processes: how they are recognized, made and written.

Three layouts are known: whole parameters, those that FSDP2 divides (``DTensor``) and those of DeepSpeed's ZeRO-3, which
are recognized by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import deepspeed_config

from hf_fnl.layers.whole import is_partitioned

Holders = dict[nn.Parameter, list[tuple[nn.Module, str]]]


def holders(model: nn.Module) -> Holders:
    """For each parameter of a model all modules that hold it, with the attribute."""
    found: Holders = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((module, name))
    return found


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that ZeRO-3 divides are whole here, and divided again with what the first process wrote to them."""
    if not any(map(is_partitioned, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def partition_(model: nn.Module) -> None:
    """Let ZeRO-3 divide the parameters of a model, in place; those on the meta device get no values."""
    import deepspeed

    config = deepspeed_config()
    dtype = next((dtype for name, dtype in _DTYPES.items() if config.get(name, {}).get("enabled") is True), None)
    held = holders(model)
    for module in model.modules():
        own = nn.ParameterList()
        for parameter in list(module._parameters.values()):
            if parameter is None or is_partitioned(parameter):
                continue
            if parameter.is_meta:
                parameter = replace_(held, parameter, torch.empty(parameter.shape, dtype=dtype or parameter.dtype))
            own.append(parameter)
        if len(own):
            deepspeed.zero.Init(module=own, config_dict_or_path=config)


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the section of DeepSpeed's configuration


def replace_(held: Holders, parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Put a new parameter in all places of another; returns it."""
    successor = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for module, attribute in held[parameter]:
        module._parameters[attribute] = successor
    return successor


@torch.no_grad()
def write_(held: Holders, parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Give parameters whole values, of which each process keeps its part; all processes call this.

    Raises:
        ValueError: If a parameter is divided but on the meta device.
    """
    with gathered(parameters):
        for parameter, value in zip(parameters, values, strict=True):
            if isinstance(parameter, DTensor):
                _write_part_(parameter, value)
            elif parameter.is_meta:
                replace_(held, parameter, value)
            else:
                parameter.copy_(value)


def _write_part_(parameter: DTensor, value: Tensor) -> None:
    local = parameter.to_local()
    if local.is_meta:
        raise ValueError("the parameters are divided on the meta device: call model.to_empty(device=...) first")
    # Without a source, each process takes its part of the value that it has.
    part = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local.copy_(part.to_local())
