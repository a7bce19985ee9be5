"""The parts that every training script shares: where a run goes and goes on, what it prints and writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_fnl.training.command_line import UsageError
from hf_fnl.training.resuming import checkpoint_to_take
from hf_fnl.training.run_lock import check_unlocked
from hf_fnl.utils.files import check_writable, write_json
from hf_fnl.utils.processes import first_decides
from hf_fnl.utils.run_files import CONFIG_FILE, METRICS_FILE, flatten

# Written by the Trainer for itself, or secret: not settings of a run.
_NOT_SETTINGS = {"hub_token", "deepspeed_plugin", "distributed_state"}


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


def write_run(folder: str | Path, metrics: dict[str, Any], *arguments: Any) -> None:
    """Write ``metrics.json`` and ``run_config.json`` into a folder."""
    write_json(Path(folder) / METRICS_FILE, metrics)
    write_json(Path(folder) / CONFIG_FILE, run_settings(*arguments))


def finish_run(trainer: Trainer, metrics: dict[str, Any], *arguments: Any) -> dict[str, Any]:
    """Save a model that was trained with what is known of its run, and print the metrics; all processes call this.

    Returns:
        The metrics.
    """
    trainer.save_state()
    if trainer.args.should_save:
        write_run(trainer.args.output_dir, metrics, *arguments)
    trainer.save_model()  # last, since it may push a card made of the rest
    trainer.log_metrics("run", flatten(metrics))
    return metrics
