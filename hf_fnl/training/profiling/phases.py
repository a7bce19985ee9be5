"""Where in a Trainer's step which phase begins and ends, and what goes back to how it was afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_fnl.optim.frobenius_decay import FrobeniusDecay
from hf_fnl.optim.product_decay import ProductDecay
from hf_fnl.training.profiling.clock import Clock
from hf_fnl.utils.processes import process

if TYPE_CHECKING:
    from hf_fnl.training.trainer import FLAMBeTrainer

DATA, FORWARD, BACKWARD, DECAY = "data", "forward", "backward", "decay"
OPTIMIZER, COMMUNICATION, ASIDE = "optimizer", "communication", "evaluation and saving"

_COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)


@contextmanager
def phases_of(trainer: FLAMBeTrainer, clock: Clock) -> Iterator[None]:
    """While this lasts, the steps of a trainer tell a clock their phases; what they compute is the same.

    Communication is what the process spends in collectives and in waiting for them: what runs beside computation costs
    a step nothing. Under DDP that is what is left to do when the last gradient is there. Under FSDP2 the all-reduces of
    the norm for clipping count as optimizer.
    """
    with ExitStack() as stack:
        if process()[1] > 1:
            stack.enter_context(_communication(trainer, clock))
        optimizers = [trainer.optimizer]
        if trainer.is_deepspeed_enabled:
            optimizers.append(trainer.accelerator.deepspeed_engine_wrapped.engine)
        for owner, name, phase in (
            (trainer, "get_batch_samples", DATA),
            (trainer, "_prepare_inputs", DATA),
            (trainer, "compute_loss", FORWARD),
            (trainer, "_penalty", DECAY),
            (trainer.accelerator, "backward", BACKWARD),
            (trainer, "_clip_grad_norm", OPTIMIZER),
            *((optimizer, "step", OPTIMIZER) for optimizer in optimizers),
            (ProductDecay, "take", DECAY),
            (ProductDecay, "term", DECAY),
        ):
            stack.enter_context(_timed(owner, name, clock, phase))
        for name in ("evaluate", "_save_checkpoint"):
            stack.enter_context(_timed(trainer, name, clock, ASIDE, whole=True))
        stack.enter_context(_timed_hooks(trainer.running_optimizer(), clock))
        yield


@contextmanager
def _timed(owner: Any, name: str, clock: Clock, phase: str, *, whole: bool = False) -> Iterator[None]:
    """Give the calls of a function, a method or a class's method to a phase; what the owner lacks is passed over."""
    original = getattr(owner, name, None)
    if original is None:
        yield
        return
    with replaced(owner, name, _in_phase(original, clock, phase, whole=whole)):
        yield


def _in_phase(function: Callable[..., Any], clock: Clock, phase: str, *, whole: bool = False) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock.phase(phase, whole=whole):
            return function(*args, **kwargs)

    return timed


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value; afterwards it is again what it was, or inherited again."""
    own = vars(owner)
    before = (own[name],) if name in own else ()
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before:
            setattr(owner, name, before[0])
        else:
            delattr(owner, name)


@contextmanager
def _timed_hooks(optimizer: torch.optim.Optimizer, clock: Clock) -> Iterator[None]:
    """Frobenius decay in front of the steps of other optimizers than FLAMBe is decay, too."""
    hooks = optimizer._optimizer_step_pre_hooks
    ours = {key: hook for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), FrobeniusDecay)}
    hooks.update({key: _in_phase(hook, clock, DECAY) for key, hook in ours.items()})
    try:
        yield
    finally:
        hooks.update({key: hook for key, hook in ours.items() if key in hooks})


@contextmanager
def _communication(trainer: FLAMBeTrainer, clock: Clock) -> Iterator[None]:
    with ExitStack() as stack:
        for name in _COLLECTIVES:
            stack.enter_context(_timed(dist, name, clock, COMMUNICATION))
        stack.enter_context(_timed(dist.Work, "wait", clock, COMMUNICATION))
        if isinstance(trainer.model_wrapped, DistributedDataParallel):
            stack.enter_context(_timed(trainer.model_wrapped, "_sync_buffers", clock, COMMUNICATION))
            stack.enter_context(_last_gradient(trainer, clock))
        elif trainer.is_fsdp_enabled:
            from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

            for name in ("wait_for_unshard", "finalize_backward"):
                stack.enter_context(_timed(FSDPParamGroup, name, clock, COMMUNICATION))
        yield


@contextmanager
def _last_gradient(trainer: FLAMBeTrainer, clock: Clock) -> Iterator[None]:
    """DDP's reducer is out of Python's sight: what is left of a backward pass after the last gradient belongs to it."""
    last: list[Any] = []

    def there(parameter: torch.Tensor) -> None:
        last[:] = [clock.mark()]

    def split(*args: Any, **kwargs: Any) -> Any:
        last.clear()
        result = original(*args, **kwargs)
        if last and trainer.accelerator.sync_gradients:
            clock.since(last[0], COMMUNICATION)
        return result

    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(there) for parameter in trained]
    original = trainer.accelerator.backward
    try:
        with replaced(trainer.accelerator, "backward", split):
            yield
    finally:
        for handle in handles:
            handle.remove()
