"""The parts that every training script shares: where a run goes and goes on, what it prints and writes."""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.training.command_line import UsageError, duration
from hf_fnl.training.resuming import checkpoint_to_take
from hf_fnl.training.run_lock import check_unlocked
from hf_fnl.utils.files import check_writable, write_json
from hf_fnl.utils.processes import first_decides
from hf_fnl.utils.run_files import CONFIG_FILE, METRICS_FILE, flatten

# Written by the Trainer for itself, or secret: not settings of a run.
_NOT_SETTINGS = {"hub_token", "deepspeed_plugin", "distributed_state"}
_NOT_SHOWN = ("_per_second", "_flos", "epoch", "_runtime")
_OF_PRODUCTS = ("frobenius_norm", "effective_rank")  # what a line shows of a kind's figures; files have all of them


def check_output_folder(args: TrainingArguments) -> None:
    """Check, before any work, that a run may write to ``output_dir`` and overwrites no other there.

    All processes of a run must call this.

    Raises:
        PermissionError: If the folder cannot be written to.
        NotADirectoryError: If it, or what it would lie in, is a file.
        RuntimeError: If another run is at work in it.
        UsageError: If it holds a run and ``resume_from_checkpoint`` is not given.
    """
    folder = Path(args.output_dir)
    first_decides(lambda: check_writable("output_dir", folder))
    first_decides(lambda: check_unlocked(folder))
    if args.resume_from_checkpoint is None and first_decides((folder / METRICS_FILE).exists):
        raise UsageError(
            f"output_dir {folder} holds a run that is done: take another folder, or set resume_from_checkpoint=true "
            "and more steps to train on from its last checkpoint"
        )


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """:func:`~hf_fnl.training.resuming.checkpoint_to_take` of a script, whose first attempt may have saved nothing."""
    checkpoint = checkpoint_to_take(Path(args.output_dir), args.resume_from_checkpoint)
    return None if checkpoint is None else str(checkpoint)


def run_settings(*arguments: Any) -> dict[str, Any]:
    """All options of a run under the names that :func:`~hf_fnl.training.command_line.parse_arguments` reads back."""
    settings: dict[str, Any] = {}
    for options in arguments:
        values = options.to_dict() if isinstance(options, TrainingArguments) else dataclasses.asdict(options)
        initial = {field.name for field in dataclasses.fields(options) if field.init}
        settings.update({key: value for key, value in values.items() if key in initial - _NOT_SETTINGS})
    return settings


def finish_run(folder: str | Path, metrics: dict[str, Any], *arguments: Any) -> dict[str, Any]:
    """Write ``metrics.json`` and ``run_config.json`` into ``folder`` and return the metrics."""
    write_json(Path(folder) / METRICS_FILE, metrics)
    write_json(Path(folder) / CONFIG_FILE, run_settings(*arguments))
    return metrics


def announce(trainer: Trainer) -> None:
    """Let a Trainer say what it is about to train, and in lines how far it is where no bar shows it."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Announcements(trainer))


class _Announcements(TrainerCallback):
    """Prints, on the first process, a few lines before training and one with each log.

    Args:
        trainer: Whose model and batches are described.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.began, self.first_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print what is trained, on what, for how long, and where it goes."""
        self.began, self.first_step = time.monotonic(), state.global_step
        if not state.is_world_process_zero:
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        size = parameter_count(model)
        share = f", {size['ratio']:.1%} of the dense model" if size["total"] != size["dense_equivalent"] else ""
        batch = self.trainer.get_total_train_batch_size(args)
        resumed = f", from step {state.global_step:,} on" if state.global_step else ""
        rate = max(getattr(kwargs.get("lr_scheduler"), "base_lrs", [args.learning_rate]))  # a checkpoint's, if any
        lines = {
            "model": f"{type(model).__name__}, {size['total']:,} parameters{share}",
            "device": f"{_device(args)}, {_count(args.world_size, 'process', 'es')}, {_precision(args)}",
            "training": f"{_count(state.max_steps, 'step')} of {batch:,} "
            f"examples{resumed}; {getattr(args.optim, 'value', args.optim)}, learning rate {rate:g}",
            "output": args.output_dir,
        }
        print("", *(f"{name:<9} {line}" for name, line in lines.items()), "", sep="\n", flush=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print figures in a line, with the time that is left by the pace so far."""
        if not (args.disable_tqdm and state.is_world_process_zero):
            return
        figures = "  ".join(
            f"{name} {_figure(value)}"
            for name, value in (logs or {}).items()
            if _is_shown(name, value) and ("/" not in name or name.endswith(_OF_PRODUCTS))
        )
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        pace = (time.monotonic() - self.began) / max(done, 1)
        remaining = f"  ({duration(pace * left)} left)" if done and left > 0 else ""
        if figures:
            print(f"step {state.global_step:,}/{state.max_steps:,}  {figures}{remaining}", flush=True)


def show_run(args: TrainingArguments, metrics: dict[str, Any], *next_commands: str) -> None:
    """Print, on the first process, what a run gave, where it lies, and what may come next.

    Args:
        args: Of the run.
        metrics: What :func:`finish_run` wrote.
        next_commands: With ``{folder}`` in the place of the folder.
    """
    if args.process_index != 0:
        return
    figures = {name: value for name, value in flatten(metrics).items() if _is_shown(name, value)}
    hidden = ("parameters / trainable", "parameters / in_products", "parameters / dense_equivalent")
    shown = {name: _figure(value) for name, value in figures.items() if name not in hidden}
    width, digits = (max(map(len, each), default=0) for each in (shown, shown.values()))
    print("", *(f"{name:<{width}}  {value:>{digits}}" for name, value in shown.items()), "", sep="\n")
    lines = [("saved in", args.output_dir)]
    for command in next_commands:
        lines.append(("" if len(lines) > 1 else "next", command.format(folder=shlex.quote(str(args.output_dir)))))
    print(*(f"{title:<9} {line}" for title, line in lines), sep="\n", flush=True)


def _is_shown(name: str, value: Any) -> bool:
    return isinstance(value, int | float) and not name.endswith(_NOT_SHOWN)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number:,} {word}{plural if number != 1 else ''}"


def _device(args: TrainingArguments) -> str:
    return torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type


def _precision(args: TrainingArguments) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
