"""A profile of training steps by torch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, schedule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

DECAY = "Frobenius decay"
TRACE_FILE, TABLE_FILE = "profile_trace.json", "profile.txt"
STEPS_BEFORE = 3  # steps that are slow because they are the first, the last of them under the profiler already
_ROWS = 40


class ProfilerCallback(TrainerCallback):
    """Profiles steps of a training in this process, for a table of ranges and operations and a Chrome trace.

    Ranges are the loader's (``enumerate(DataLoader)``), the optimizer's (``Optimizer.step``) and that of the decay.

    Args:
        steps: How many, after the first three.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the profiler."""
        self._folder = Path(args.output_dir)
        timing = schedule(wait=STEPS_BEFORE - 1, warmup=1, active=self.steps, repeat=1)
        self._profiler = profile(schedule=timing, on_trace_ready=self._write)
        self._profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell it that a step is done."""
        self._profiler.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it, which writes what there is."""
        self._profiler.stop()
        if self._profiler.step_num <= STEPS_BEFORE:
            logger.warning("no step was profiled: the training ended within the first %d", STEPS_BEFORE)

    def _write(self, profiler: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        device = "device" if torch.cuda.is_available() else "cpu"
        table = profiler.key_averages().table(sort_by=f"{device}_time_total", row_limit=_ROWS)
        (self._folder / TABLE_FILE).write_text(table, encoding="utf-8")
        profiler.export_chrome_trace(str(self._folder / TRACE_FILE))
