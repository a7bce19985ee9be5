"""Profiles some steps of a Trainer's own run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.planning.flops import matrix_rate, step_flops, structure_of
from hf_fnl.training.profiling.clock import Clock
from hf_fnl.training.profiling.phases import phases_of, replaced
from hf_fnl.training.profiling.profile import Profile, Settings
from hf_fnl.utils.files import write_json
from hf_fnl.utils.processes import process

if TYPE_CHECKING:
    from hf_fnl.training.trainer import FLAMBeTrainer

PROFILE_FILE = "profile.json"
_TRACED = 2  # steps


class StepProfiler(TrainerCallback):
    """Says where the time of a training's steps goes, once, after its first steps.

    The steps compute what they would without it. The table is shown by the first process and written to
    ``profile.json`` in the output folder.

    Args:
        trainer: Whose steps; its callback this is. The model is looked at now, as the engine has not changed it yet.
        steps: How many to profile; fewer where the training ends before.
        after: Steps before them, in which kernels are compiled and memory is taken.
        trace: File of a trace of two further steps, for Chrome's or Perfetto's viewer.
        show: What the first process does with the profile.
        clock: Of the phases; one for the trainer's device unless given.

    Attributes:
        profile: What was found, in the first process, after the last of the steps.
        show: As above.
    """

    def __init__(
        self,
        trainer: FLAMBeTrainer,
        *,
        steps: int,
        after: int,
        trace: str | None = None,
        show: Callable[[Profile], object] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._trainer, self._steps, self._after, self._trace = trainer, steps, after, trace
        self.show = show or (lambda profile: sys.stdout.write(f"{profile.text()}\n"))
        self._clock = clock or Clock(trainer.args.device)
        self._attached = ExitStack()
        self._tracer: Any = None
        self._seen = self._taken = 0
        self._batches = _Batches(trainer)
        self._look_at_model()
        self.profile: Profile | None = None

    def remove(self) -> None:
        """Leave the trainer alone, whatever it was doing."""
        self._attached.close()
        self._clock.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the steps of this training; begin if none is to be passed over."""
        self._seen = 0
        if not self._after:
            self._start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin, go on or end."""
        self._seen += 1
        if self._clock.runs:
            self._clock.end_step()
            self._taken += 1
            if self._taken == self._steps:
                self._finish()
        elif self._seen == self._after:
            self._start()
        elif self._tracer is not None and self._seen == self._after + self._steps + _TRACED:
            self._write_trace()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End with the steps that there were."""
        if self._clock.runs:
            self._finish()
        if self._tracer is not None:
            self._write_trace()

    def _start(self) -> None:
        trainer, device = self._trainer, self._trainer.args.device
        if trainer.args.has_dense_phase:
            self._look_at_model()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._taken, self._batches = 0, _Batches(trainer)
        self._attached.enter_context(phases_of(trainer, self._clock))
        seen = self._batches.seen_by(trainer.get_batch_samples)
        self._attached.enter_context(replaced(trainer, "get_batch_samples", seen))
        self._clock.start()

    def _finish(self) -> None:
        steps = self._clock.stop()
        self._attached.close()
        if process()[0] == 0 and steps:
            self.profile = self._of(steps)
            write_json(Path(self._trainer.args.output_dir) / PROFILE_FILE, self.profile.as_dict())
            self.show(self.profile)
            if self._trace is not None:
                self._tracer = torch.profiler.profile()
                self._tracer.start()

    def _of(self, steps: list[dict[str, float]]) -> Profile:
        settings = _settings(self._trainer)
        flops, note = self._flops(len(steps))
        return Profile(
            settings=settings,
            steps=steps,
            items=self._batches.items / len(steps),
            unit=self._batches.unit,
            padding=self._batches.padding(),
            flops=flops,
            rate=matrix_rate(self._trainer.args.device, getattr(torch, settings.dtype)) if flops else None,
            peak_memory=_peak_memory(self._trainer.args.device),
            note=note,
        )

    def _look_at_model(self) -> None:
        self._structure = _or_reason(lambda: structure_of(self._trainer.accelerator.unwrap_model(self._trainer.model)))

    def _flops(self, steps: int) -> tuple[dict[str, float] | None, str]:
        """Operations of a step, in proportion to what the first batch needs; or why they are not known."""
        (structure, reason), batches = self._structure, self._batches
        if structure is not None:
            counted, reason = _or_reason(lambda: step_flops(structure, batches.first))
            if counted is not None:
                self._structure = (None, "counted already")  # a structure is used once
                times = batches.items / batches.count(batches.first) / steps
                return {"forward": times * counted.forward, "backward": times * counted.backward}, ""
        return None, f"operations were not counted: {reason}"

    def _write_trace(self) -> None:
        self._tracer.stop()
        assert self._trace is not None
        Path(self._trace).parent.mkdir(parents=True, exist_ok=True)
        self._tracer.export_chrome_trace(self._trace)
        self._tracer = None


class _Batches:
    """What the batches of some steps hold.

    Args:
        trainer: Whose batches.
    """

    def __init__(self, trainer: FLAMBeTrainer) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._main = getattr(model, "main_input_name", "input_ids")
        self._both_sides = getattr(model.config, "is_encoder_decoder", False) if hasattr(model, "config") else False
        self.items = 0
        self.first: dict[str, Tensor] = {}
        self._kept: Any = 0  # a tensor, read when the time is no longer taken
        self._masked = 0

    @property
    def unit(self) -> str:
        """What is counted."""
        return "tokens" if self._main == "input_ids" else "examples"

    def seen_by(self, get: Callable[..., Any]) -> Callable[..., Any]:
        """A function that returns batches first, which looks at what it returns."""

        def looking(*args: Any, **kwargs: Any) -> Any:
            returned = get(*args, **kwargs)
            for batch in returned[0]:
                self._look_at(batch)
            return returned

        return looking

    def count(self, batch: dict[str, Tensor]) -> int:
        """Tokens of a text, on both sides of a translation; else examples."""
        main = batch[self._main]
        if self._main != "input_ids":
            return len(main)
        return main.numel() + (batch["labels"].numel() if self._both_sides and "labels" in batch else 0)

    def padding(self) -> float | None:
        """Share of the masked tokens."""
        return 1 - float(self._kept) / self._masked if self._masked else None

    def _look_at(self, batch: dict[str, Any]) -> None:
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
        if self._main not in tensors:
            return
        self.first = self.first or tensors
        self.items += self.count(tensors)
        mask = tensors.get("attention_mask")
        if mask is not None and mask.shape == tensors[self._main].shape:
            self._kept = self._kept + (mask != 0).sum()
            self._masked += mask.numel()


def _settings(trainer: FLAMBeTrainer) -> Settings:
    args = trainer.args
    parameter = next(trainer.model.parameters())
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else parameter.dtype
    return Settings(
        dtype=str(dtype).removeprefix("torch."),
        device=str(args.device),
        compiled=args.torch_compile,
        workers=args.dataloader_num_workers,
        accumulation=args.gradient_accumulation_steps,
        processes=process()[1],
        optim=str(getattr(args.optim, "value", args.optim)),
        penalty=bool(args.frobenius_decay) and args.frobenius_mode == "penalty",
    )


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if importlib.util.find_spec("resource") is None:  # not on Windows
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _or_reason(work: Callable[[], Any]) -> tuple[Any, str]:
    """What some work returns; or ``None`` and why it failed: a model may do what tensors without values cannot."""
    try:
        return work(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
