"""Callbacks of every training: diagnostics of products, and the number of the epoch for the training set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.attention import Product
from hf_fnl.optim.diagnostics import Figures, diagnose, summarize
from hf_fnl.training.engines import full_parameters

DIAGNOSTICS_FILE = "diagnostics.jsonl"


class DiagnosticsCallback(TrainerCallback):
    """Logs the diagnostics of products every ``every`` steps.

    Means per kind go to ``log``, so to TensorBoard and the console; every product's figures go to ``diagnostics.jsonl``
    in the output folder, one line a step. Where parameters are sharded, all processes gather them, a product at a time.

    Args:
        products: What to watch; the attribute may be set anew between steps. Nothing is logged while it is empty.
        every: Steps between two logs.
        log: The ``log`` method of a Trainer.
    """

    def __init__(self, products: Sequence[Product], every: int, log: Callable[[dict[str, float]], None]) -> None:
        self.products, self.every, self.log = products, every, log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what an earlier run wrote after the step at which this one starts; log the start of a fresh run."""
        path = Path(args.output_dir) / DIAGNOSTICS_FILE
        if state.is_world_process_zero and path.exists():
            lines = path.read_text().splitlines(keepends=True) if state.global_step else []
            whole = [line for line in lines if line.endswith("\n")]  # one that was being written when a run was killed
            path.write_text("".join(line for line in whole if json.loads(line)["step"] <= state.global_step))
        if state.global_step == 0:
            self._record(args, state, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log when the step is due."""
        if state.global_step % self.every == 0:
            # Logging clears the request for the Trainer's own log of this step.
            should_log = control.should_log
            self._record(args, state, **kwargs)
            control.should_log = should_log

    def _record(
        self,
        args: TrainingArguments,
        state: TrainerState,
        *,
        model: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        **_: Any,
    ) -> None:
        if not self.products:
            return
        rate = lr_scheduler.get_last_lr()[0]  # of an optimizer whose parameters have no names
        rates = {name: group["lr"] for group in optimizer.param_groups for name in group.get("param_names", ())}
        figures: dict[str, Figures] = {}
        for product in self.products:
            with full_parameters(model, product.parameter_names) as parameters:
                if state.is_world_process_zero:
                    own = rates.get(product.parameter_names[0], rate)
                    figures |= diagnose(parameters, [product], learning_rate=own)
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / DIAGNOSTICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "products": figures}) + "\n")
        self.log(summarize(figures, self.products))


class DecayCallback(TrainerCallback):
    """Raises, before anything moves, if a subclass of the trainer overrides what adds Frobenius decay to an update.

    Args:
        decaying: Returns the method of the trainer that is to add it; ``None`` where the optimizer does.
    """

    def __init__(self, decaying: Callable[[], str | None]) -> None:
        self._decaying, self.is_added = decaying, False

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is added yet."""
        self.is_added = False

    def on_pre_optimizer_step(self, args: Any, *more: Any, **kwargs: Any) -> None:
        """Check that it is."""
        if not self.is_added and (method := self._decaying()):
            raise ValueError(
                f"no Frobenius decay was added: the {method} of this trainer does not call that of FLAMBeTrainer, as "
                f"frobenius_mode={args.frobenius_mode} needs it; let it do so, or set frobenius_mode=decoupled"
            )


class EpochCallback(TrainerCallback):
    """Callback that tells the training set of a Trainer, one that is no stream, which epoch begins.

    accelerate's data loader does so by itself only where it uses the Trainer's batch sampler as it is. Where it wraps
    that, to share batches out to processes or to skip those that a resumed run has seen, the sampler gets the epoch and
    the data set does not; streams always do. :class:`~hf_fnl.training.FLAMBeTrainer` has this callback already.

    Args:
        told: What is told in the place of the training set, such as a sampler of batches. It need not have
            ``set_epoch``.
    """

    def __init__(self, told: Any = None) -> None:
        self.told = told

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the number of finished epochs on."""
        told: Any = self.told or getattr(kwargs["train_dataloader"], "dataset", None)
        if hasattr(told, "set_epoch") and not isinstance(told, IterableDataset):
            told.set_epoch(int(state.epoch or 0))
