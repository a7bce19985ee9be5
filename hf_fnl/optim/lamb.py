"""LAMB: the direction of Adam, and a step for each tensor in proportion to its norm."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam

from hf_fnl.optim.sharding import Sharding, Shards, names_of
from hf_fnl.optim.state import check_loaded, check_options, check_parameter, check_state

# On a CPU, tensors of up to so many elements are updated together, because calls cost more than their arithmetic.
_SMALL = 2**14
_ROW = 2**15  # elements whose squares are added up one by one

# Returns what is decayed, given names, parameters, and memory that may be overwritten with it.
Terms = Callable[[list[str], list[Tensor], list[Tensor]], list[Tensor]]
Memory = Callable[[list[Tensor]], list[Tensor]]


class Batch(NamedTuple):
    """Tensors that are updated together, of one dtype and on one device; all but the first contiguous."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]  # how often each was updated before, in float32
    terms: list[Tensor]  # what is decayed: for LAMB the parameters themselves
    updates: list[Tensor]  # memory for the updates, which may be that of the terms


def lamb_update_(
    batch: Batch, *, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    """Update tensors ``p`` by ``u = m / (sqrt(v) + eps) + weight_decay * term``: ``p -= lr * (||p|| / ||u||) * u``."""
    squares = lamb_directions_(batch, betas=betas, eps=eps, weight_decay=weight_decay)
    lamb_move_(batch.params, batch.updates, squares, lr=lr, weight_decay=weight_decay)


def lamb_directions_(batch: Batch, *, betas: tuple[float, float], eps: float, weight_decay: float) -> Tensor:
    """Move the moments, write ``u``, and return the squares of ``||p||`` and ``||u||``, shape ``(tensors, 2)``.

    A step of Adam with a rate of -1 adds ``m / (sqrt(v) + eps)`` to ``weight_decay * term``.
    """
    params, grads, exp_avgs, exp_avg_sqs, steps, terms, updates = batch
    compiling = torch.compiler.is_compiling()
    for term, update in zip(terms, updates, strict=True):
        torch.mul(term, weight_decay, out=update)
    adam(
        updates,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        list(torch.stack(steps).unbind()),  # a copy, for Adam counts it
        fused=not compiling,
        foreach=compiling,
        capturable=compiling,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=-1.0,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )
    return norms(params + updates).view(2, -1).T.square()


def norms(tensors: list[Tensor]) -> Tensor:
    """Return the norms of tensors of one dtype on one device, in float32 or wider.

    On a CPU torch adds up the squares of a tensor one by one, and leaves out the more of them the more there are (0.1 %
    of the norm of 23 million numbers, 4 % of 262 million): rows are added up by themselves.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    if not tensors[0].is_cpu or all(tensor.numel() <= _ROW for tensor in tensors):
        return torch.stack(torch._foreach_norm(tensors, 2, wide))
    found = []
    for flat in (tensor.flatten() for tensor in tensors):
        count = flat.numel() // _ROW
        rows = flat[: count * _ROW].view(count, _ROW)
        rest = torch.linalg.vector_norm(flat[rows.numel() :], dtype=wide)
        found.append(torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=wide), rest.view(1)]).norm())
    return torch.stack(found)


def lamb_move_(
    params: list[Tensor], updates: list[Tensor], squares: Tensor, *, lr: float | Tensor, weight_decay: float
) -> None:
    """Subtract ``lr * (||p|| / ||u||) * u``; the ratio is 1 without decay, and where a norm is 0."""
    param_norms, update_norms = squares.sqrt().unbind(1)
    ratios = torch.where(torch.minimum(param_norms, update_norms) > 0, param_norms / update_norms, 1.0)
    rates = (ratios if weight_decay != 0 else torch.ones_like(ratios)) * -lr
    torch._foreach_addcmul_(params, updates, list(rates.unbind()))


class Lamb(Optimizer):
    r"""LAMB (You et al. 2020) as NVIDIA's BERT pretraining defines it.

    With the moments ``m`` and ``v`` of Adam after bias correction, every tensor ``p`` is updated by

    ``update = m / (sqrt(v) + eps) + weight_decay * p`` and ``p -= lr * (||p|| / ||update||) * update``,

    where the ratio is 1 if ``weight_decay`` or one of the norms is 0. Half-precision parameters have half-precision
    moments and every result is rounded to their dtype, as in torch's own optimizers; norms are computed in float32.
    On a CPU, memory of the size of the largest parameter is kept beside the moments.

    The result does not depend on how parameters are sharded, by FSDP2 (also hybrid) or DeepSpeed's ZeRO: norms are
    those of full parameters, at the cost of one message of 8 bytes a parameter in each step.

    Args:
        params: Parameters, named parameters (``model.named_parameters()``) or groups of either.
        lr: Learning rate, a number or a tensor without dimensions.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Coefficient of decay.
        compiled: Compiles the update with ``torch.compile``, once for each group: worth it on a GPU. States are the
            same, results differ by rounding. Groups, and betas of a schedule, beyond
            ``torch._dynamo.config.recompile_limit`` are updated without it.

    Raises:
        ValueError: If an option, here or in a group, is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        compiled: bool = False,
    ) -> None:
        self.compiled = compiled
        self._sharding = Sharding()
        self._buffers: dict[torch.dtype, Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, if its options are in range."""
        check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._sharding.remember(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, without waiting for their device.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: If a gradient is sparse.
            ValueError: If a parameter cannot be updated, or its gradient or its state does not fit it, as after the
                model was cast or a state of another model was loaded.

        Whatever is raised, nothing has moved.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        shards = self._sharding.find(self.param_groups)
        self.check()
        terms = self._take_terms(shards)
        if shards is not None:
            self._step_shards(shards, terms)
            return loss
        for number, group in enumerate(self.param_groups):
            pairs = zip(names_of(group, number), group["params"], strict=True)
            rows = [(n, p, p.grad.contiguous(), *self._state(p)) for n, p in pairs if p.grad is not None]
            for _, batch in self._batches(rows, terms, self._memory):
                self._run(lamb_update_)(batch, lr=self._rate(group, batch), **_options(group))
            if rows:
                torch._foreach_add_([step for *_, step in rows], 1)
        return loss

    def check(self) -> None:
        """Raise, as :meth:`step` does before it changes anything, if a parameter with a gradient cannot be updated."""
        for number, group in enumerate(self.param_groups):
            for name, parameter in zip(names_of(group, number), group["params"], strict=False):  # ZeRO: one for all
                if parameter.grad is not None:
                    check_parameter(name, parameter)
                    if state := self.state.get(parameter):
                        check_state(name, parameter, state)

    def _take_terms(self, shards: Shards | None) -> Terms:
        """Return what ``weight_decay`` multiplies in this step; called before anything moves."""
        return lambda names, params, outs: params

    def _step_shards(self, shards: Shards, terms: Terms) -> None:
        """Update what is sharded: tensors move when the norms of all of each are known."""
        held = [shard for _, each in shards.due for shard in each]
        if not held:
            return
        wide = torch.promote_types(held[0].owner.dtype, torch.float32)
        squares = torch.zeros(len(held), 2, dtype=wide, device=held[0].owner.device)
        number, work, steps = {shard.name: i for i, shard in enumerate(held)}, [], {}
        for group, each in shards.due:
            rows = []
            for shard in (shard for shard in each if shard.owner.grad is not None):
                exp_avg, exp_avg_sq, step = self._state(shard.owner)
                steps[id(step)] = step  # ZeRO's flat owners hold several parameters
                gradient: Any = shard.owner.grad
                tensors = (shard.owner.detach(), gradient.contiguous(), exp_avg, exp_avg_sq)
                rows.append((shard.name, *map(shard.of, tensors), step))
            for names, batch in self._batches(rows, terms, _new_memory):
                places = [number[name] for name in names]
                squares[places] = self._run(lamb_directions_)(batch, **_options(group)).to(wide)
                work.append((group, batch, places))
        if shards.processes.rank > 0:  # of what every process holds, one norm counts
            squares[[i for i, shard in enumerate(held) if shard.group is None]] = 0
        shards.processes.sum_(squares)
        for group, batch, places in work:
            options = {"lr": self._rate(group, batch), "weight_decay": group["weight_decay"]}
            self._run(lamb_move_)(batch.params, batch.updates, squares[places], **options)
        if steps:
            torch._foreach_add_(list(steps.values()), 1)

    def _state(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return state["exp_avg"], state["exp_avg_sq"], state["step"]

    def _batches(
        self, rows: Iterable[tuple[Any, ...]], terms: Terms, memory: Memory
    ) -> Iterator[tuple[list[str], Batch]]:
        """Batch what is on one device and in one dtype, with names; on a CPU large tensors go alone."""
        batches = defaultdict(list)
        for row in rows:
            name, p, *_ = row
            alone = p.is_cpu and p.numel() > _SMALL and not self.compiled
            batches[p.device, p.dtype, name if alone else None].append(row)
        for batch in batches.values():
            columns: list[list[Any]] = [list(column) for column in zip(*batch, strict=True)]
            names, params, grads, exp_avgs, exp_avg_sqs, steps = columns
            updates = memory(params)
            terms_of_batch = terms(names, params, updates)
            yield names, Batch(params, grads, exp_avgs, exp_avg_sqs, steps, terms_of_batch, updates)

    def _memory(self, params: list[Tensor]) -> list[Tensor]:
        """Return memory for updates, reused for large tensors on a CPU: allocating it costs as much as the step."""
        p = params[0]
        if len(params) > 1 or not p.is_cpu or p.numel() <= _SMALL:
            return _new_memory(params)
        if p.dtype not in self._buffers or self._buffers[p.dtype].numel() < p.numel():
            self._buffers[p.dtype] = p.new_empty(p.numel())
        return [self._buffers[p.dtype][: p.numel()].view(p.shape)]

    def _run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _compiled(function) if self.compiled else function

    def _rate(self, group: dict[str, Any], batch: Batch) -> float | Tensor:
        """Return the learning rate; as a tensor where a schedule would otherwise mean to compile anew."""
        lr: float | Tensor = group["lr"]
        return torch.full((), lr, device=batch.params[0].device) if self.compiled and not isinstance(lr, Tensor) else lr

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": self.compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by ``load_state_dict``, which takes steps and the order in memory as they were saved.

        Raises:
            ValueError: If an option, a name or a state is not one of these parameters; nothing has changed then.
        """
        check_loaded(getattr(self, "param_groups", ()), state)
        super().__setstate__(state)
        if not hasattr(self, "_sharding"):  # a copy
            self._sharding, self._buffers = Sharding(self.param_groups), {}


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: group[key] for key in ("betas", "eps", "weight_decay")}


def _new_memory(params: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params]
