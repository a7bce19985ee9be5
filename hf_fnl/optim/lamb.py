"""LAMB, compiled, or at the speed of torch's fused Adam kernel, which computes its direction."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_fnl.optim import fused as kernels
from hf_fnl.optim.sharding import Collectives, Fragment, shards_of
from hf_fnl.optim.state import check_parameter, check_state

# What `weight_decay` multiplies, given a fragment and, where there is one, a tensor that may be overwritten with it.
DecayTerm = Callable[[Fragment, Tensor | None], Tensor]

# On a CPU, tensors of up to the first number of elements are updated together, because calls cost more than their
# arithmetic. Larger ones go alone, in pieces of the second number of elements, so that the cache still holds what one
# operation wrote when the next one reads it. The fastest of the powers of two on 2 cores with 32 MB of shared cache.
_SMALL = 2**14
_PIECE = 2**20
# Elements on a CPU from which kernels are compiled without being asked to: a hundred steps earn what that takes.
_COMPILED = 2**22


class _Slot(NamedTuple):
    """A fragment of a parameter, and the same range of its gradient and state."""

    fragment: Fragment
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class Lamb(Optimizer):
    r"""LAMB (You et al. 2020) as NVIDIA's BERT pretraining defines it.

    With the moments ``m`` and ``v`` of Adam after bias correction, every tensor ``p`` is updated by

    ``update = m / (sqrt(v) + eps) + weight_decay * p`` and ``p -= lr * (||p|| / ||update||) * update``,

    where the ratio is 1 if ``weight_decay`` or one of the norms is 0. Half-precision parameters have half-precision
    moments and every result is rounded to their dtype, as in torch's own optimizers; norms are computed in float32.
    Besides the moments, a CPU keeps memory of the size of the largest parameter.

    The result does not depend on how parameters are divided among processes, by FSDP2 (also hybrid) or DeepSpeed's
    ZeRO: norms are those of whole parameters, at the cost of one message of 8 bytes a parameter in each step. Until it
    is there, the updates of this process's share of the parameters stay in memory.

    Args:
        params: Parameters, named parameters (``model.named_parameters()``) or groups of either.
        lr: Learning rate, a number or a tensor without dimensions.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Coefficient of decay.
        max_grad_norm: Gradients are first clipped, in place, to this norm over all groups. ``None`` leaves them as
            they are, which is right wherever a Trainer or an engine clips.
        fused: Whether kernels of our own update what they can, faster: on a CPU one that a C++ compiler on this
            machine builds in a second or two, in each process, on a GPU three that Triton compiles. ``None``: on a
            CPU, if the step moves 4 million elements or more and there is a compiler. What kernels do not take, and
            everything with ``False``, is updated by operations of torch, as is what a CUDA graph captures. States are
            the same; results differ by rounding, so that replicas want all the same: a compiler, or ``False``.

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
        max_grad_norm: float | None = None,
        fused: bool | None = None,
    ) -> None:
        if max_grad_norm is not None and not (isinstance(max_grad_norm, int | float) and max_grad_norm > 0):
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {max_grad_norm!r}")
        self.max_grad_norm, self.fused = max_grad_norm, fused
        self._scratch: dict[torch.dtype, Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, if its options are in range."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        shards_of(self).remember()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, without waiting for their device.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: If a gradient is sparse, or ``fused`` is true and there is no compiler.
            ValueError: If a parameter cannot be updated, or its gradient or its state does not fit it, as after the
                model was cast or a state of another model was loaded.

        Whatever is raised, nothing has moved.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        shards = shards_of(self)
        due, collectives = shards.due(), shards.collectives
        self.check()
        fragments = [fragment for _, held in due for fragment in held]
        decay_term = self._decay_term(fragments)
        slots = [[self._slot(f, f.owner.grad) for f in held if f.owner.grad is not None] for _, held in due]
        compiled = self._compiled_devices(slots)
        if self.max_grad_norm is not None:
            self._clip(slots, shards.steps_in_parts)
        steps = {id(slot.step): slot.step for slots_of_group in slots for slot in slots_of_group}
        if steps:
            _count(list(steps.values()))
        updates: Iterable[_Update | _Compiled] = (
            update
            for (group, _), slots_of_group in zip(due, slots, strict=True)
            for update in self._updates(slots_of_group, decay_term, group, compiled, keep=collectives is not None)
        )
        if collectives is not None:
            kept = [update for update in updates if isinstance(update, _Update)]
            updates = _with_whole_norms(kept, fragments, collectives)
        for update in updates:
            update.apply()
        return loss

    def check(self) -> None:
        """Raise, as :meth:`step` does before it changes anything, if a parameter with a gradient cannot be updated."""
        if torch.compiler.is_compiling():
            return
        for name, parameter in _named(self.param_groups):
            if parameter.grad is not None:
                check_parameter(name, parameter, clips=self.max_grad_norm is not None)
                if state := self.state.get(parameter):
                    check_state(name, parameter, state)

    def _decay_term(self, due: Sequence[Fragment]) -> DecayTerm:
        """What ``weight_decay`` multiplies in this call of ``step``, which moves ``due``; called before they move."""
        return lambda fragment, buffer: fragment.local

    def _writes_term(self, fragment: Fragment) -> bool:
        """Whether the decay term of a fragment is written into the buffer that it is given."""
        return False

    def _compiled_devices(self, slots: Iterable[Sequence[_Slot]]) -> set[torch.device]:
        """The devices on which kernels do this step."""
        if self.fused is False or torch.compiler.is_compiling():
            return set()
        sizes: Counter[torch.device] = Counter()
        for slots_of_group in slots:
            for slot in slots_of_group:
                if kernels.takes(slot.parameter, slot.grad):
                    sizes[slot.parameter.device] += slot.parameter.numel()
        asked = self.fused is True
        return {at for at, size in sizes.items() if kernels.are_for(at, asked=asked, worth=size >= _COMPILED)}

    def _slot(self, fragment: Fragment, grad: Tensor) -> _Slot:
        owner, state = fragment.owner, self.state[fragment.owner]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device)
            state["exp_avg"] = torch.zeros_like(owner, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(owner, memory_format=torch.contiguous_format)
        moments = fragment.part(state["exp_avg"]), fragment.part(state["exp_avg_sq"])
        return _Slot(fragment, fragment.local, fragment.part(grad), *moments, state["step"])

    def _clip(self, slots: Iterable[Sequence[_Slot]], steps_in_parts: bool) -> None:
        if steps_in_parts:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm}: under ZeRO no step sees all gradients, so DeepSpeed has to clip; "
                "set gradient_clipping in its configuration, and max_grad_norm=None here"
            )
        owners = [slot.fragment.owner for slots_of_group in slots for slot in slots_of_group]
        torch.nn.utils.clip_grad_norm_(owners, self.max_grad_norm)  # type: ignore[arg-type]

    def _updates(
        self,
        slots: Sequence[_Slot],
        decay_term: DecayTerm,
        group: dict[str, Any],
        compiled: set[torch.device],
        *,
        keep: bool,
    ) -> Iterator[_Update | _Compiled]:
        """The updates of a group; each of them, unless it is to be kept, only until the next one is asked for."""
        others, alone, together = [], [], defaultdict(list)
        for slot in slots:
            if slot.parameter.device not in compiled or not kernels.takes(slot.parameter, slot.grad):
                others.append(slot)
            elif slot.parameter.is_cpu and not keep and self._writes_term(slot.fragment):
                alone.append([slot])  # its term takes the memory that updates share
            else:
                together[slot.parameter.device, slot.parameter.dtype].append(slot)
        for batch in (*alone, *together.values()):
            yield self._compiled(batch, decay_term, group, keep=keep)
        for batch in _batches(others):
            yield self._update(batch, decay_term, group, keep=keep)

    def _compiled(
        self, batch: list[_Slot], decay_term: DecayTerm, group: dict[str, Any], *, keep: bool
    ) -> _Update | _Compiled:
        if batch[0].parameter.is_cpu and not keep:
            largest = max((slot.parameter for slot in batch), key=Tensor.numel)
            rows = _rows(batch, decay_term, [self._buffer(largest)] * len(batch))
            return _Compiled(rows, group)
        updates = _one_memory([slot.parameter for slot in batch])
        rows = _rows(batch, decay_term, updates)
        if batch[0].parameter.is_cpu:
            return _Update(batch, group, updates, kernels.update_rows(rows, group, moves=False))
        from hf_fnl.optim.fused_gpu import Launches  # needs Triton

        launched = Launches([row[:-1] for row in rows])
        return _Update(batch, group, updates, launched.directions([row.step for row in rows], group), launched.move)

    def _update(self, batch: list[_Slot], decay_term: DecayTerm, group: dict[str, Any], *, keep: bool) -> _Update:
        if is_large(batch[0].parameter):
            (slot,) = batch
            buffer = torch.empty_like(slot.parameter) if keep else self._buffer(slot.parameter)
            return _in_pieces(slot, decay_term(slot.fragment, buffer), buffer, group)
        return _together(batch, [decay_term(slot.fragment, None) for slot in batch], group)

    def _buffer(self, parameter: Tensor) -> Tensor:
        """Memory for the update of one tensor at a time, kept because a CPU is slow to hand out new memory."""
        scratch = self._scratch.get(parameter.dtype)
        if scratch is None or scratch.numel() < parameter.numel():
            scratch = self._scratch[parameter.dtype] = parameter.new_empty(parameter.numel())
        return scratch[: parameter.numel()].view(parameter.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "fused": self.fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by ``load_state_dict``, which takes steps and the order in memory as they were saved.

        Raises:
            ValueError: If an option, a name or a state is not one of these parameters; nothing has changed then.
        """
        for group, loaded in zip(getattr(self, "param_groups", ()), state["param_groups"], strict=False):
            pairs = zip(group.get("param_names", ()), loaded.get("param_names", ()), strict=False)
            if differ := next((pair for pair in pairs if pair[0] != pair[1]), None):
                raise ValueError(f"the state to load has {differ[1]} in the place of {differ[0]}: its order is another")
        for group in state["param_groups"]:
            _check_options(group)
        for name, parameter in _named(state["param_groups"]):
            if values := state["state"].get(parameter):
                fitting = {key: _as_kept(key, value, parameter) for key, value in values.items()}
                check_state(name, parameter, fitting)
                values.update(fitting)
        super().__setstate__(state)
        self._scratch = {}


def _named(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """The parameters of groups with what errors call them."""
    for number, group in enumerate(groups):
        names = group.get("param_names") or [f"parameter {i} of group {number}" for i in range(len(group["params"]))]
        yield from zip(names, group["params"], strict=False)  # of ZeRO's flat parameters the first stands for all


def _as_kept(key: str, value: Any, parameter: Tensor) -> Any:
    """What ``load_state_dict`` takes as it was saved, on the device and in the order in memory of a state."""
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device) if key == "step" else value.contiguous()


def _check_options(options: dict[str, Any]) -> None:
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


def _count(steps: list[Tensor]) -> None:
    if steps[0].is_cpu:  # where a number would be made a tensor for each of them
        torch._foreach_add_(steps, torch.ones(()), alpha=1)
    else:
        torch._foreach_add_(steps, 1)


def is_large(tensor: Tensor) -> bool:
    """Whether its arithmetic costs more than its calls, so that it goes alone."""
    return tensor.is_cpu and tensor.numel() > _SMALL


def _batches(slots: Sequence[_Slot]) -> list[list[_Slot]]:
    """What is updated at once: a large tensor, or all small ones on one device and in one dtype."""
    alone, together = [], defaultdict(list)
    for slot in slots:
        if is_large(slot.parameter):
            alone.append([slot])
        else:
            together[slot.parameter.device, slot.parameter.dtype].append(slot)
    return alone + list(together.values())


class _Update(NamedTuple):
    """Updates of some tensors, and the squared norms of tensors and updates, ``(n, 2)``, over what is held here."""

    slots: list[_Slot]
    group: dict[str, Any]
    directions: list[Tensor]
    squares: Tensor
    move: Callable[[Tensor], None] | None = None  # a kernel that takes the step sizes

    def apply(self) -> None:
        """Move the tensors."""
        parameter_norms, update_norms = self.squares.sqrt().unbind(1)
        step_sizes = _step_size(parameter_norms, update_norms, self.group)
        if self.move is not None:
            self.move(step_sizes)
            return
        parameters = [slot.parameter for slot in self.slots]
        torch._foreach_addcmul_(parameters, self.directions, list(step_sizes.unbind()))


class _Compiled(NamedTuple):
    """Updates that are computed when they are applied, all in one call."""

    rows: list[kernels.Row]
    group: dict[str, Any]

    def apply(self) -> None:
        """Move the tensors, and their moments."""
        kernels.update_rows(self.rows, self.group, moves=True)


def _rows(batch: Sequence[_Slot], decay_term: DecayTerm, updates: Sequence[Tensor]) -> list[kernels.Row]:
    terms = (decay_term(slot.fragment, update).contiguous() for slot, update in zip(batch, updates, strict=True))
    return [
        kernels.Row(slot.parameter, slot.grad.contiguous(), slot.exp_avg, slot.exp_avg_sq, term, update, slot.step)
        for slot, term, update in zip(batch, terms, updates, strict=True)
    ]


def _one_memory(like: Sequence[Tensor]) -> list[Tensor]:
    """Uninitialized tensors like those given, in one allocation."""
    sizes = [tensor.numel() for tensor in like]
    parts = like[0].new_empty(sum(sizes)).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _with_whole_norms(updates: list[_Update], fragments: Sequence[Fragment], collectives: Collectives) -> list[_Update]:
    """The updates with the norms of whole tensors, from one message about all ``fragments`` of this step."""
    if not updates:
        return []
    squares = torch.zeros(len(fragments), 2, dtype=updates[0].squares.dtype, device=updates[0].squares.device)
    number = {id(fragment): i for i, fragment in enumerate(fragments)}
    rows = [[number[id(slot.fragment)] for slot in update.slots] for update in updates]
    for update, where in zip(updates, rows, strict=True):
        squares[where] = update.squares.to(squares.dtype)
    if collectives.rank > 0:  # of what every process holds, one norm counts
        squares[[i for i, fragment in enumerate(fragments) if fragment.group is None]] = 0
    collectives.sum_(squares, "norms")
    return [update._replace(squares=squares[where]) for update, where in zip(updates, rows, strict=True)]


def _in_pieces(slot: _Slot, decay: Tensor, update: Tensor, group: dict[str, Any]) -> _Update:
    """Compute the update of one large tensor, a piece at a time."""
    rows = [
        tensor.contiguous().view(-1)
        for tensor in (slot.parameter, slot.grad, slot.exp_avg, slot.exp_avg_sq, decay, update)
    ]
    squares = []
    for start in range(0, update.numel(), _PIECE):
        p, grad, exp_avg, exp_avg_sq, term, u = (row[start : start + _PIECE] for row in rows)
        torch.mul(term, group["weight_decay"], out=u)
        _add_direction([u], [grad], [exp_avg], [exp_avg_sq], [slot.step], group)
        squares += [_squared_norm(p), _squared_norm(u)]
    return _Update([slot], group, [update], torch.stack(squares).view(-1, 2).sum(0, keepdim=True))


def _together(batch: list[_Slot], decay: list[Tensor], group: dict[str, Any]) -> _Update:
    """Compute the updates of many tensors, one operation on all of them at a time."""
    _, parameters, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*batch, strict=True))
    updates = list(torch._foreach_mul([term.contiguous() for term in decay], group["weight_decay"]))
    _add_direction(updates, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs, steps, group)
    dtype = torch.promote_types(updates[0].dtype, torch.float32)
    norms = [torch.stack(torch._foreach_norm(tensors, 2, dtype)) for tensors in (parameters, updates)]
    return _Update(batch, group, updates, torch.stack(norms, dim=1).square_())


def _add_direction(
    updates: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    """Move the moments and add ``m / (sqrt(v) + eps)`` to ``updates``, which is a step of Adam with a rate of -1."""
    beta1, beta2 = group["betas"]
    torch._fused_adam_(
        updates,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _squared_norm(vector: Tensor) -> Tensor:
    wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
    return torch.dot(wide, wide)


def _step_size(parameter_norm: Tensor, update_norm: Tensor, group: dict[str, Any]) -> Tensor:
    """``-lr`` times the trust ratio."""
    if group["weight_decay"] == 0:
        return torch.ones_like(parameter_norm) * -group["lr"]
    trusted = torch.minimum(parameter_norm, update_norm) > 0
    return torch.where(trusted, parameter_norm / update_norm, 1.0) * -group["lr"]
