"""``hf-fnl profile``: its options, and a profile as a person reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fnl.cli.terminal import option, session, usage

if TYPE_CHECKING:
    from rich.table import Table

    from hf_fnl.training.profiling import Profile

_RANKS, _OUT = "Ranks", "Results"
_CHECKPOINTING = "gradient_checkpointing"
_EXAMPLES = 256  # of the data set that is made up; it is gone through again and again


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="bert-base, bert-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, marian; or a model's folder, "
            "config.json or id on the Hub. Weights are drawn.",
        ),
    ],
    batch_size: Annotated[int, option("batch-size", "Examples of a forward pass.", also="batch", min=1)] = 8,
    sequence_length: Annotated[int, option("sequence-length", "Tokens of a text.", also="length", min=1)] = 128,
    accumulation: Annotated[int, option("accumulation", "Forward passes of a step.", min=1)] = 1,
    steps: Annotated[int, option("steps", "Steps to look at.", min=1)] = 10,
    warmup: Annotated[int, option("warmup", "Steps before them.", min=0)] = 3,
    optimizer: Annotated[
        str, option("optimizer", "flambe, lamb, or an optimizer of Transformers.", also="optim")
    ] = "flambe",
    frobenius_decay: Annotated[
        str, option("frobenius-decay", "Kinds of products to decay, with commas between; flambe: ov.")
    ] = "",
    frobenius_mode: Annotated[
        str, option("frobenius-mode", "For other optimizers: decoupled, coupled or penalty.")
    ] = "decoupled",
    bf16: Annotated[bool, option("bf16", "Mixed precision.")] = False,
    compiled: Annotated[bool, option("compile", "Compile the model (torch.compile).")] = False,
    checkpointing: Annotated[bool, option("checkpointing", "Compute activations twice to keep fewer.")] = False,
    num_workers: Annotated[int, option("num-workers", "Processes that prepare data.", min=0)] = 0,
    device: Annotated[str, option("device", "cpu or cuda; cuda where there is one, unless given.")] = "",
    qk_rank: Annotated[int | None, option("qk-rank", "Of query-key products.", panel=_RANKS, min=1)] = None,
    ov_rank: Annotated[int | None, option("ov-rank", "Of output-value products.", panel=_RANKS, min=1)] = None,
    ffn_rank: Annotated[int | None, option("ffn-rank", "Of feed-forward matrices.", panel=_RANKS, min=1)] = None,
    embedding_rank: Annotated[
        int | None, option("embedding-rank", "Of the word embedding.", panel=_RANKS, min=1)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the profile as JSON.", rich_help_panel=_OUT)
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a trace of two steps, for chrome://tracing.", rich_help_panel=_OUT),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train a few steps on made-up examples, and say where the time goes.

    Data, forward and backward pass, decay, optimizer, communication and the rest add up to a step. Beside them stand
    the speed, the operations of a step and the share of the device's matrix rate, as measured, that they reach. For
    your own data and launcher give a training script --profile_steps 10.
    """
    with session(as_json=False, debug=debug) as terminal:
        from hf_fnl.planning import fresh_model
        from hf_fnl.training import FLAMBeTrainingArguments

        with usage():
            uses_cpu = _runs_on_cpu(device)
        ranks = {"qk_rank": qk_rank, "ov_rank": ov_rank, "ffn_rank": ffn_rank, "embedding_rank": embedding_rank}
        options = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "optim": optimizer,
            "frobenius_decay": list(filter(None, frobenius_decay.replace(" ", "").split(","))) or None,
            "frobenius_mode": frobenius_mode,
            "bf16": bf16,
            "torch_compile": compiled,
            "dataloader_num_workers": num_workers,
            "use_cpu": uses_cpu,
            "max_steps": warmup + steps + (2 if trace else 0),
            "profile_steps": steps,
            "profile_after": warmup,
            "profile_trace": str(trace) if trace else None,
        }
        if checkpointing:
            fields = FLAMBeTrainingArguments.__dataclass_fields__  # Transformers 5.23 has the first of these names
            options["activation_checkpointing" if "activation_checkpointing" in fields else _CHECKPOINTING] = True
        with terminal.step("training"):
            found = _train(fresh_model(model, **ranks), sequence_length, FLAMBeTrainingArguments, options)
        if json_file is not None:
            from hf_fnl.utils.files import write_text

            write_text(json_file, json.dumps({"model": model, "ranks": ranks, **found.as_dict()}, indent=2) + "\n")
        terminal.show({}, *_views(model, found))


def _runs_on_cpu(device: str) -> bool:
    """Whether a device as it was given, or ``""``, is the CPU; raises a ``ValueError`` if there is no such device."""
    import torch

    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, and torch sees no GPU here; leave --device out, or take cpu")
    return device == "cpu" or not torch.accelerator.is_available()


def _train(model: Any, length: int, arguments: Any, options: dict[str, Any]) -> Profile:
    """Train a few steps, leaving no file."""
    import tempfile

    from transformers import PrinterCallback, default_data_collator

    from hf_fnl.planning.examples import random_examples
    from hf_fnl.training import FLAMBeTrainer

    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        with usage():
            args = arguments(output_dir=folder, **quiet, **options)
        size = args.per_device_train_batch_size
        examples = random_examples(model, max(size, _EXAMPLES // size * size), length)
        trainer = FLAMBeTrainer(model, args, train_dataset=examples, data_collator=default_data_collator)
        trainer.remove_callback(PrinterCallback)
        profiler = trainer.profiler
        assert profiler is not None
        profiler.show = lambda profile: None
        trainer.train()
    assert profiler.profile is not None
    return profiler.profile


def _views(model: str, found: Profile) -> list[Any]:
    settings = found.settings
    compiled = ", compiled" if settings.compiled else ""
    title = f"{model}: {len(found.steps)} steps on {settings.device}, {settings.dtype}{compiled}, {settings.optim}"
    hints = [f"- {hint}" for hint in found.advice()]
    return [title, "", _table(found), "", *found.facts(), *(["", *hints] if hints else [])]


def _table(found: Profile) -> Table:
    from rich.table import Table  # which --help does not wait for

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(("where the time goes", "ms", "share")):
        table.add_column(column, justify="right" if number else "left")
    *phases, step = found.rows()
    for row in phases:
        table.add_row(*row)
    table.add_row(*step, style="bold")
    return table
