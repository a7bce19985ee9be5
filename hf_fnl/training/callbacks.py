"""Callbacks that watch products during training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.diagnostics import diagnose, summarize
from hf_fnl.products import Product

DIAGNOSTICS_FILE = "diagnostics.jsonl"


class DiagnosticsCallback(TrainerCallback):
    """Logs the diagnostics of products every ``every`` steps.

    Means per kind go to ``log``, so to TensorBoard and the console; every product's figures go to ``diagnostics.jsonl``
    in the output folder, one line a step.

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
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state.global_step))
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
        self, args: TrainingArguments, state: TrainerState, *, model: nn.Module, lr_scheduler: Any, **_: Any
    ) -> None:
        if not (state.is_world_process_zero and self.products):
            return
        figures = diagnose(model, self.products, learning_rate=lr_scheduler.get_last_lr()[0])
        path = Path(args.output_dir) / DIAGNOSTICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "products": figures}) + "\n")
        self.log(summarize(figures, self.products))
