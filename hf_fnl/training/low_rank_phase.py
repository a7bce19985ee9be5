"""Training that begins dense and goes on low-rank (Kamalakara et al. 2022, Sec. 3.4)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.optim.transfer import transfer_
from hf_fnl.training.command_line import UsageError
from hf_fnl.training.form import shapes

# What the log of a run says about its switch: the number of parameters from then on.
LOG_KEY = "low_rank_parameters"

Follow = Callable[[Optimizer, Mapping[str, Tensor], nn.Module], None]


class DenseThenLowRank(TrainerCallback):
    """Trains a model as it is for some steps, then factorizes it in place and goes on with its factors.

    The switch comes before the first step of the low-rank phase: the checkpoint, evaluation and log of step ``steps``
    are the last of the dense model. It takes no random numbers from the run. The state of the optimizer follows, see
    :func:`~hf_fnl.optim.transfer.transfer_`, and ``log_history`` gets an entry ``low_rank_parameters``. So that a
    mistake in ``factorize`` shows at once, a copy of the model is factorized when the training begins.

    A run that was broken off goes on exactly as if it had not been. In a :class:`~hf_fnl.training.FLAMBeTrainer`, which
    has options for all of this, nothing is to be done for it. A Trainer of Transformers needs the model in the form
    that it has in the checkpoint::

        callback = DenseThenLowRank(1000, functools.partial(factorize_, config=FactorizationConfig(rank=64)))
        trainer = Trainer(model, args, callbacks=[callback], ...)
        match_checkpoint_(model, checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)

    Args:
        steps: Optimizer steps of the dense phase.
        factorize: Changes the model that it is given, in place.
        lr_scale: The learning rate is multiplied by this at the switch, now and for the rest of its schedule.
        follow: Called with the optimizer, the parameters from before the switch by name and the model, to let the
            optimizer follow in place of :func:`~hf_fnl.optim.transfer.transfer_`; may renew what wraps the model.

    Raises:
        ValueError: If an option is out of range. When the training begins: if it is no longer than ``steps``, its
            schedule is no :class:`torch.optim.lr_scheduler.LambdaLR`, the state from which it goes on does not fit
            ``steps`` or the model, ``factorize`` changes nothing, it is to end with the best checkpoint, or, without
            ``follow``, the training is distributed.
    """

    def __init__(
        self,
        steps: int,
        factorize: Callable[[nn.Module], object],
        *,
        lr_scale: float = 1.0,
        follow: Follow | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"the dense phase must have at least 1 step, got {steps}")
        if not lr_scale > 0:
            raise ValueError(f"lr_scale must be positive, got {lr_scale}")
        self.steps, self.factorize, self.lr_scale, self.follow = steps, factorize, lr_scale, follow

    def is_ahead(self, state: TrainerState) -> bool:
        """Whether the switch is ahead of a run in this state.

        Raises:
            ValueError: If the run was switched after another number of steps than ``steps``.
        """
        ahead = _logged_parameters(state) is None
        if ahead != (state.global_step <= self.steps):
            form = "dense" if ahead else "low-rank"
            raise ValueError(
                f"the run is {form} at step {state.global_step}, and with a dense phase of {self.steps} steps it would "
                "not be; go on with as many dense steps as it was begun with"
            )
        return ahead

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        """Find what would go wrong at the switch or after it."""
        if self.steps >= state.max_steps:
            raise ValueError(
                f"a dense phase of {self.steps} steps leaves none of {state.max_steps} to the low-rank one"
            )
        if not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(
                f"the learning rate cannot be taken over to factors in a {type(lr_scheduler).__name__}; choose an "
                "lr_scheduler_type that is a function of the step, such as linear, cosine or constant"
            )
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end could load a dense checkpoint into factors: set it to false")
        if self.follow is None:
            _check_plain(args)
        if self.is_ahead(state):
            self._factorize(copy.deepcopy(model))
        elif (count := _count(model)) != _logged_parameters(state):
            raise ValueError(
                f"the model has {count:,} parameters and had {_logged_parameters(state):,} when it became low-rank: "
                "call hf_fnl.training.match_checkpoint_(model, checkpoint) before train"
            )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LambdaLR,
        **kwargs: Any,
    ) -> None:
        """Switch, if the dense phase is over."""
        if state.global_step != self.steps:
            return
        before = self._factorize(model)
        (self.follow or transfer_)(optimizer, before, model)
        _continue_rates(lr_scheduler, optimizer.param_groups, self.lr_scale)
        state.log_history.append({"step": state.global_step, LOG_KEY: _count(model)})

    def _factorize(self, model: nn.Module) -> dict[str, Tensor]:
        """Factorize a model; returns the parameters that it had."""
        before: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        with torch.random.fork_rng({p.device for p in before.values() if p.is_cuda}):
            self.factorize(model)
        if shapes(before.items()) == shapes(model.named_parameters(remove_duplicate=False)):
            raise ValueError(f"factorize left the {type(model).__name__} that it was given as it was")
        return before


def _check_plain(args: TrainingArguments) -> None:
    kind = AcceleratorState().distributed_type
    if kind is not DistributedType.NO:
        raise ValueError(
            f"a model cannot change under {kind.value} in this trainer; train in one process, or on several with "
            "FLAMBeTrainer"
        )


def _logged_parameters(state: TrainerState) -> int | None:
    return next((entry[LOG_KEY] for entry in state.log_history if LOG_KEY in entry), None)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _continue_rates(scheduler: LambdaLR, groups: list[dict[str, Any]], scale: float) -> None:
    """Go on with ``scale`` times the learning rates, in groups that may be others than before."""

    def fitted(values: list[Any]) -> list[Any]:
        # Groups of another number come from a trainer that gives all of them one rate.
        return values if len(values) == len(groups) else values[:1] * len(groups)

    base = [scale * rate for rate in fitted(scheduler.base_lrs)]
    last = [scale * rate for rate in fitted(scheduler.get_last_lr())]
    for group, initial, rate in zip(groups, base, last, strict=True):
        group["initial_lr"], group["lr"] = initial, rate
    scheduler.lr_lambdas = fitted(scheduler.lr_lambdas)
    scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": base, "_last_lr": last})


def later_ranks(
    dense_steps: int, ranks: Mapping[str, Any], factor_init: str | Mapping[str, str]
) -> Callable[[Any], object] | None:
    """Return a script's ``factorize`` for a model of ours: its ``factorize_`` with the ranks that were asked for.

    There is none without a dense phase, and no rank for what comes after it is a ``UsageError``.
    """
    if not dense_steps:
        return None
    given = {option: rank for option, rank in ranks.items() if rank is not None}
    if not given:
        raise UsageError(f"dense_steps={dense_steps} needs ranks for the steps after them, such as ffn_rank")
    return lambda model: model.factorize_(factor_init=factor_init, **given)
