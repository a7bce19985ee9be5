"""LAMB, at the speed of torch's fused Adam kernel, which computes its direction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

# What `weight_decay` multiplies, given a parameter and, where there is one, a tensor that may be overwritten with it.
DecayTerm = Callable[[Tensor, Tensor | None], Tensor]

# On a CPU, tensors of up to the first number of elements are updated together, because calls cost more than their
# arithmetic. Larger ones go alone, in pieces of the second number of elements, so that the cache still holds what one
# operation wrote when the next one reads it. The fastest of the powers of two on 2 cores with 32 MB of shared cache.
_SMALL = 2**14
_PIECE = 2**20


class _Slot(NamedTuple):
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

    Args:
        params: Parameters, named parameters (``model.named_parameters()``) or groups of either.
        lr: Learning rate, a number or a tensor without dimensions.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Coefficient of decay.
        max_grad_norm: Gradients are first clipped, in place, to this norm over all groups. ``None`` leaves them as
            they are, which is right wherever a Trainer or an engine clips.

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
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self._scratch: dict[torch.dtype, Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does, if its options are in range."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, without waiting for their device.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: If a gradient is sparse; no parameter has moved then.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        slots = [[self._slot(p, p.grad) for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if self.max_grad_norm is not None:
            parameters = [slot.parameter for slots_of_group in slots for slot in slots_of_group]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        decay_term = self._decay_term()
        for group, slots_of_group in zip(self.param_groups, slots, strict=True):
            alone, together = _partition(slots_of_group)
            for slot in alone:
                _update_in_pieces(slot, decay_term, self._buffer(slot.parameter), group)
            for batch in together:
                _update_together(batch, decay_term, group)
        return loss

    def _decay_term(self) -> DecayTerm:
        """What ``weight_decay`` multiplies in this step; called before any parameter moves."""
        return lambda parameter, buffer: parameter

    def _slot(self, parameter: Tensor, grad: Tensor) -> _Slot:
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{type(self).__name__} takes dense gradients only, got a {grad.layout} one for a parameter of shape "
                f"{tuple(parameter.shape)}; build the embedding that makes it with sparse=False"
            )
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        return _Slot(parameter, grad, state["exp_avg"], state["exp_avg_sq"], state["step"])

    def _buffer(self, parameter: Tensor) -> Tensor:
        """Memory for the update of one tensor at a time, kept because a CPU is slow to hand out new memory."""
        scratch = self._scratch.get(parameter.dtype)
        if scratch is None or scratch.numel() < parameter.numel():
            scratch = self._scratch[parameter.dtype] = parameter.new_empty(parameter.numel())
        return scratch[: parameter.numel()].view(parameter.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by ``load_state_dict``, which takes steps and the order in memory as they were saved."""
        super().__setstate__(state)
        self._scratch = {}
        for parameter in (p for group in self.param_groups for p in group["params"] if p in self.state):
            values = self.state[parameter]
            values["step"] = values["step"].to(parameter.device)
            values["exp_avg"], values["exp_avg_sq"] = values["exp_avg"].contiguous(), values["exp_avg_sq"].contiguous()


def _check_options(options: dict[str, Any]) -> None:
    lr, betas, eps, weight_decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")


def _partition(slots: list[_Slot]) -> tuple[list[_Slot], list[list[_Slot]]]:
    """Tensors to be updated one at a time, and batches, each on one device and in one dtype, to be updated at once."""
    alone, together = [], defaultdict(list)
    for slot in slots:
        parameter = slot.parameter
        # A DTensor knows its operations, but not how to lie in one row that could be cut.
        if parameter.is_cpu and parameter.numel() > _SMALL and type(slot.grad) is Tensor:
            alone.append(slot)
        else:
            together[parameter.device, parameter.dtype].append(slot)
    return alone, list(together.values())


def _update_in_pieces(slot: _Slot, decay_term: DecayTerm, update: Tensor, group: dict[str, Any]) -> None:
    """Update one large tensor, a piece at a time; its update gathers in ``update``."""
    slot.step.add_(1)
    tensors = (slot.parameter, slot.grad, slot.exp_avg, slot.exp_avg_sq, decay_term(slot.parameter, update), update)
    rows = [tensor.contiguous().view(-1) for tensor in tensors]
    squares = []
    for start in range(0, update.numel(), _PIECE):
        p, grad, exp_avg, exp_avg_sq, decay, u = (row[start : start + _PIECE] for row in rows)
        torch.mul(decay, group["weight_decay"], out=u)
        _add_direction([u], [grad], [exp_avg], [exp_avg_sq], [slot.step], group)
        squares += [_squared_norm(p), _squared_norm(u)]
    parameter_norm, update_norm = torch.stack(squares).view(-1, 2).sum(0).sqrt_().unbind()
    slot.parameter.addcmul_(update, _step_size(parameter_norm, update_norm, group))


def _update_together(slots: list[_Slot], decay_term: DecayTerm, group: dict[str, Any]) -> None:
    """Update many tensors, one operation on all of them at a time."""
    parameters, grads, exp_avgs, exp_avg_sqs, steps = (list(column) for column in zip(*slots, strict=True))
    torch._foreach_add_(steps, 1)
    decay = [decay_term(p, None).contiguous() for p in parameters]
    updates = list(torch._foreach_mul(decay, group["weight_decay"]))
    _add_direction(updates, [grad.contiguous() for grad in grads], exp_avgs, exp_avg_sqs, steps, group)
    dtype = torch.promote_types(updates[0].dtype, torch.float32)
    norms = [torch.stack(torch._foreach_norm(tensors, 2, dtype)) for tensors in (parameters, updates)]
    step_sizes = _step_size(norms[0], norms[1], group)
    torch._foreach_addcmul_(parameters, updates, list(step_sizes.unbind()))


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
