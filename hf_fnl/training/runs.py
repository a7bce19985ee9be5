"""What every script shares: reading its arguments, and writing what it did beside the model."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_fnl.models.cards.record import CONFIG_FILE, METRICS_FILE
from hf_fnl.processes import first_decides
from hf_fnl.training.checkpoints.folders import checkpoints
from hf_fnl.training.checkpoints.resume import check_whole, newest_whole
from hf_fnl.training.files import write_json

# Written by the Trainer for itself, or secret: not settings of a run.
_NOT_SETTINGS = {"hub_token", "deepspeed_plugin", "distributed_state"}


def parse_arguments(argv: Sequence[str] | None, *classes: type) -> tuple[Any, ...]:
    """Read flags, or one YAML or JSON file with the same names, into dataclasses.

    Args:
        argv: Command line without the program's name; that of the process unless given.
        classes: Dataclasses of options, with metadata as :class:`transformers.HfArgumentParser` reads it.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not YAML or JSON, or holds a key that no class has.
    """
    parser = HfArgumentParser(classes)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or Path(arguments[0]).suffix not in {".json", ".yaml", ".yml"}:
        return parser.parse_args_into_dataclasses(arguments)
    path = Path(arguments[0])
    if not path.is_file():
        raise FileNotFoundError(f"no such configuration file: {path}")
    parse = parser.parse_json_file if path.suffix == ".json" else parser.parse_yaml_file
    try:
        return parse(str(path))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the configuration file {path}: {error}") from error


FACTOR_INIT_HELP = (
    "spectral, spectral_ones or default; or selector=method each, as in linear=spectral ov:encoder=spectral, and "
    "default for the rest."
)


def init_methods(entries: Sequence[str]) -> str | dict[str, str]:
    """How factors start, as a configuration takes it, from the values of the flag ``factor_init``.

    Args:
        entries: One method for all factors, or ``selector=method`` each.

    Raises:
        ValueError: If a method stands among others without a selector.
    """
    if len(entries) == 1 and "=" not in entries[0]:
        return entries[0]
    split = [entry.partition("=") for entry in entries]
    if bare := [selector for selector, equals, _ in split if not equals]:
        raise ValueError(f"factor_init takes one method, or selector=method each; got {bare[0]!r} among several")
    return {selector: method for selector, _, method in split}


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint from which a run goes on, or ``None`` to start afresh.

    ``resume_from_checkpoint`` may name a checkpoint, or be ``true`` for the newest whole one in ``output_dir``, if any.
    All processes of a run must call this.

    Raises:
        FileNotFoundError: If the checkpoint that is named is not there.
        ValueError: If ``output_dir`` holds checkpoints and nothing was said about them, or the one that is named, or
            every one, is not whole.
    """
    run, asked = Path(args.output_dir), args.resume_from_checkpoint
    if asked is None:
        if found := first_decides(lambda: checkpoints(run)):
            raise ValueError(
                f"output_dir {run} holds {found[-1].name} of an earlier run: set resume_from_checkpoint=true to go on "
                "from it, or another output_dir"
            )
        return None
    if str(asked).lower() == "true":
        newest = newest_whole(run)
        return None if newest is None else str(newest)
    if not os.path.isdir(asked):
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {asked}")
    check_whole(Path(asked))
    return str(asked)


def run_settings(*arguments: Any) -> dict[str, Any]:
    """All options of a run under the names that :func:`parse_arguments` reads back."""
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
