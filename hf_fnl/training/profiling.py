"""Where the time of training steps goes, seen by torch's profiler."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

FORWARD, PASSES, DECAY = "forward", "forward and backward", "decay"
TRACE_FILE, TABLE_FILE = "profile_trace.json", "profile.txt"
_STEP = "training step"
# The ranges of a step, by the beginnings of their names; the loader's and the optimizer's are torch's own.
_RANGES = {
    "step": _STEP,
    "data": "enumerate(DataLoader)",
    PASSES: PASSES,
    FORWARD: FORWARD,
    "optimizer": "Optimizer.step",
    DECAY: DECAY,
}
_BEFORE, _OPERATIONS = 3, 25


def parse_steps(text: str) -> tuple[int, int, bool]:
    """Read ``N``, so many steps after the first three, or ``FROM:TO``, the steps of these numbers.

    Returns:
        The first and the last step, and whether they are counted from where the run begins.

    Raises:
        ValueError: If it has another form, or there is no such step.
    """
    first, colon, last = text.partition(":")
    try:
        steps = (int(first), int(last), False) if colon else (_BEFORE + 1, _BEFORE + int(first), True)
    except ValueError:
        steps = (0, 0, False)
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"profile_steps must be N or FROM:TO, steps counted from 1, got {text}")
    return steps


class ProfilerCallback(TrainerCallback):
    """Profiles some steps of a training in the first process, and writes a Chrome trace and a table.

    The table of ranges has the time of the CPU, which under a GPU is that of giving work out; what the device does is
    in the table of operations and in the trace.

    Args:
        steps: As :func:`parse_steps` reads it.
    """

    def __init__(self, steps: str) -> None:
        self.first, self.last, self._from_start = parse_steps(steps)
        self._profiler: profile | None = None
        self._step = ExitStack()
        self._done = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, if the first step is one of them."""
        if self._from_start:
            self.first, self.last = self.first + state.global_step, self.last + state.global_step
        self._begin(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin before the first of the steps, write after the last."""
        self._step.close()
        if self._profiler is not None:
            self._done += 1
            if state.global_step >= self.last:
                self._write(args)
        if not control.should_training_stop:
            self._begin(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what there is, if the training ended before the last of the steps."""
        self._step.close()
        if self._profiler is not None and self._done:
            self._write(args)
        elif self._done == 0 and args.process_index == 0:
            logger.warning("no step was profiled: the training ended at %d, before %d", state.global_step, self.first)

    def _begin(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._profiler is None and state.global_step + 1 == self.first and args.process_index == 0:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self._profiler.start()
        if self._profiler is not None:
            self._step.enter_context(record_function(_STEP))

    def _write(self, args: TrainingArguments) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / TRACE_FILE))
        events = profiler.key_averages()
        device = "device" if torch.cuda.is_available() else "cpu"
        operations = events.table(sort_by=f"self_{device}_time_total", row_limit=_OPERATIONS)
        text = f"{ranges_table(events, self.first, self._done)}\n\n{operations}"
        (folder / TABLE_FILE).write_text(text, encoding="utf-8")
        print(f"{text.partition('-' * 9)[0].rstrip()}\n\noperations in {folder / TABLE_FILE}, trace in {TRACE_FILE}")


def ranges_table(events: Any, first: int, steps: int) -> str:
    """Return the milliseconds of each range in a step, and its share of the step, as a person reads them.

    Args:
        events: From ``profile.key_averages()``.
        first: Number of the first step.
        steps: How many there are.
    """
    totals = {
        name: sum(event.cpu_time_total for event in events if event.key.startswith(beginning)) / 1e3 / steps
        for name, beginning in _RANGES.items()
    }
    # "forward" is also the beginning of "forward and backward".
    totals[FORWARD] -= totals[PASSES]
    rows = [f"steps {first} to {first + steps - 1}, milliseconds of the CPU in each; forward and decay lie in others"]
    rows += [f"{name:<22}{value:10.2f}{value / totals['step']:8.1%}" for name, value in totals.items()]
    return "\n".join(rows)
