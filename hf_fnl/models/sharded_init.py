"""The weights that one process draws, drawn by many: each decomposes its share and none needs the whole model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fnl.layers import Factorized
from hf_fnl.layers.whole import whole_shape
from hf_fnl.math.spectral import DRAWN_METHODS
from hf_fnl.models.division import holders, partition_, write_
from hf_fnl.models.draws import Draws, Group, matrix_cost
from hf_fnl.surgery.record import layer_record
from hf_fnl.utils.processes import process

Model = TypeVar("Model", bound=PreTrainedModel)
Factorize = Callable[[PreTrainedModel], object]


def make_whole(make: Callable[[], Model], factorize: Factorize | None = None, *, keep: bool = True) -> Model:
    """What ``make`` makes, decomposed by all processes together.

    Args:
        make: Makes the model, the same in every process.
        factorize: Surgery on what it makes.
        keep: Whether this process keeps the weights; its parameters are on the meta device otherwise.
    """
    draws, model = _drafted(make, factorize)
    initialize_(model, draws, keep=keep)
    return model


def make_partitioned(make: Callable[[], Model], factorize: Factorize | None = None) -> Model:
    """What ``make`` makes, divided by ZeRO-3 in the way that the configuration known to Transformers says.

    Args:
        make: Makes the model, the same in every process.
        factorize: Surgery on what it makes.
    """
    draws, model = _drafted(make, factorize)
    partition_(model)
    initialize_(model, draws)
    return model


def _drafted(make: Callable[[], Model], factorize: Factorize | None) -> tuple[Draws, Model]:
    """What a model draws, and the model on the meta device."""
    draws = Draws(make)
    model: Any = copy.deepcopy(draws.model)
    if factorize is not None:
        factorize(model)
    return draws, model


@torch.no_grad()
def initialize_(model: PreTrainedModel, draws: Draws | None = None, *, keep: bool = True) -> None:
    """Give a model the weights that one process draws, in place, wherever its parameters are; all processes call this.

    A few parameters at a time are whole: each process draws them and keeps its part. Matrices are decomposed by one
    process each, which sends the factors to the others. The random streams must be equal in all processes, and are
    afterwards where ``type(model)(model.config)`` leaves them in one. With FSDP2::

        with torch.device("meta"):
            model = FactorizedBertForMaskedLM(config)
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        initialize_(model.to_empty(device="cuda"))

    Layers that surgery put into a stock model on the meta device get the factors of what that model draws for them.

    Args:
        model: Whole, on the meta device, or divided by FSDP2 or ZeRO-3.
        draws: Those of ``type(model)(model.config)`` unless given.
        keep: Whether this process sets parameters; if not, it only takes its share of the work.

    Raises:
        RuntimeError: If another process could not decompose its matrices.
        ValueError: If a parameter gets no value, is divided but on the meta device, or surgery drew its factors.
    """
    draws = draws or Draws(lambda: type(model)(copy.deepcopy(model.config)))
    jobs, held = _jobs(model, draws), holders(model)
    for job in jobs:
        if keep and not job.cost:
            write_(held, job.parameters, job.compute())
    # The costliest first, so that what is computed side by side takes about as long.
    costly = sorted((job for job in jobs if job.cost), key=lambda job: -job.cost)
    count = process()[1]
    for start in range(0, len(costly), count):
        for job, values in _computed(costly[start : start + count]):
            if keep:
                write_(held, job.parameters, values)
    _set_buffers_(model, draws.model)


@dataclass(frozen=True)
class _Job:
    """Parameters that are computed together.

    Args:
        parameters: Those of the model.
        cost: Time to decompose what is drawn; 0 if nothing is.
        compute: Gives their values.
    """

    parameters: list[nn.Parameter]
    cost: float
    compute: Callable[[], list[Tensor]]


def _jobs(model: PreTrainedModel, draws: Draws) -> list[_Job]:
    dense = dict(draws.model.named_modules(remove_duplicate=False))
    cut = {
        f"{name}.weight": layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, Factorized) and not isinstance(dense.get(name), Factorized)
    }
    for name, layer in cut.items():
        if layer.init in DRAWN_METHODS:
            raise ValueError(
                f"surgery made {name.removesuffix('.weight')} with init={layer.init!r}, which draws after the model is "
                "drawn: use init='spectral', or factorize in one process and load the result"
            )
    jobs = [_job(model, draws, group, {n: cut[n] for n in group.names if n in cut}) for group in draws.groups]
    given = {parameter for job in jobs for parameter in job.parameters}
    if missing := [name for name, parameter in model.named_parameters() if parameter not in given]:
        raise ValueError(f"{missing[0]} is not among what a {type(model).__name__} of this configuration draws")
    return jobs


def _job(model: PreTrainedModel, draws: Draws, group: Group, cut: dict[str, Factorized]) -> _Job:
    """The values of a group, with the factors of surgery's layers in the place of their weights."""
    names: list[str] = []
    for name in group.names:
        factors = [f for f, _ in cut[name].named_parameters(recurse=False) if f != "bias"] if name in cut else []
        names += [f"{name.removesuffix('weight')}{factor}" for factor in factors] or [name]

    def compute() -> list[Tensor]:
        values: list[Tensor] = []
        for name, value in draws.draw(group).items():
            dense = draws.model.get_submodule(name.rpartition(".")[0])
            values += _split(dense, value, cut[name]) if name in cut else [value]
        return values

    parameters = [model.get_parameter(name) for name in names]
    return _Job(parameters, draws.cost(group) + sum(map(_cutting_cost, cut.values())), compute)


def _cutting_cost(layer: Factorized) -> float:
    m, *others = layer.shape
    return matrix_cost(m, math.prod(others))


def _split(dense: nn.Module, weight: Tensor, layer: Factorized) -> list[Tensor]:
    """The factors of a weight, as surgery makes them."""
    filled = copy.copy(dense)
    filled._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
    ours: Any = type(layer)
    return list(ours.from_dense(filled, **layer_record(layer), init=layer.init).factors())


def _computed(jobs: Sequence[_Job]) -> Iterator[tuple[_Job, list[Tensor]]]:
    """Jobs, one for each process at most, with values that their process has computed and sent."""
    rank, count = process()
    own = _compute(jobs[rank]) if rank < len(jobs) else None
    _check_all(own if isinstance(own, Exception) else None)
    for owner, job in enumerate(jobs):
        values = own if owner == rank and isinstance(own, list) else None
        yield job, values if values is not None and count == 1 else _sent(values, job.parameters, owner)


def _compute(job: _Job) -> list[Tensor] | Exception:
    try:
        return job.compute()
    except Exception as error:
        return error


def _check_all(error: Exception | None) -> None:
    """Raise in all processes if there is an error in one: the others would wait for it for ever."""
    failures = torch.tensor(float(error is not None), device=_exchange_device())
    if process()[1] > 1:
        dist.all_reduce(failures)
    if error is not None:
        raise error
    if failures:
        raise RuntimeError("another process could not decompose what it drew; its own error says why")


def _sent(values: list[Tensor] | None, parameters: Sequence[nn.Parameter], owner: int) -> list[Tensor]:
    """Values that only their owner has yet."""
    device = _exchange_device()
    if values is not None:
        sent = [value.to(device, p.dtype).contiguous() for value, p in zip(values, parameters, strict=True)]
    else:
        sent = [torch.empty(whole_shape(p), dtype=p.dtype, device=device) for p in parameters]
    for value in sent:
        dist.broadcast(value, owner)
    return sent


def _exchange_device() -> torch.device:
    """Where tensors must be to be sent."""
    if process()[1] == 1 or "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    accelerator: Any = torch.accelerator.current_accelerator()
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _set_buffers_(model: nn.Module, source: nn.Module) -> None:
    """Copy the buffers of a model, which a division on the meta device leaves without values."""
    for name, buffer in source.named_buffers():
        holder, _, attribute = name.rpartition(".")
        module = model.get_submodule(holder)
        theirs = module._buffers[attribute]
        module._buffers[attribute] = buffer.clone() if theirs is None or theirs.is_meta else theirs.copy_(buffer)
