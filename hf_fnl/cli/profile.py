"""``hf-fnl profile``: its options, and a profile as a person reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hf_fnl.cli.terminal import session

if TYPE_CHECKING:
    from hf_fnl.training.profiling import Profile

_RUN, _RANKS, _OUT = "Run", "Ranks", "Results"
_CHECKPOINTING = "gradient_checkpointing"
_EXAMPLES = 256  # of the data set that is made up; it is gone through again and again


def _option(*names: str, text: str, panel: str = _RUN, **limits: Any) -> Any:
    """An option that may be written with dashes, as the other commands do, or as the scripts' flags are."""
    spellings = dict.fromkeys(f"--{spelling}" for name in names for spelling in (name, name.replace("-", "_")))
    return typer.Option(*spellings, help=text, rich_help_panel=panel, **limits)


def profile(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="bert-base, bert-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, marian; or a model's folder, "
            "config.json or id on the Hub. Weights are drawn.",
        ),
    ],
    batch_size: Annotated[int, _option("batch-size", "batch", text="Examples of a forward pass.", min=1)] = 8,
    sequence_length: Annotated[int, _option("sequence-length", "length", text="Tokens of a text.", min=1)] = 128,
    accumulation: Annotated[int, _option("accumulation", text="Forward passes of a step.", min=1)] = 1,
    steps: Annotated[int, _option("steps", text="Steps to look at.", min=1)] = 10,
    warmup: Annotated[int, _option("warmup", text="Steps before them.", min=0)] = 3,
    optimizer: Annotated[
        str, _option("optimizer", "optim", text="flambe, lamb, or an optimizer of Transformers.")
    ] = "flambe",
    frobenius_decay: Annotated[
        str, _option("frobenius-decay", text="Kinds of products to decay, with commas between; flambe: ov.")
    ] = "",
    frobenius_mode: Annotated[
        str, _option("frobenius-mode", text="For other optimizers: decoupled, coupled or penalty.")
    ] = "decoupled",
    bf16: Annotated[bool, _option("bf16", text="Mixed precision.")] = False,
    compiled: Annotated[bool, _option("compile", text="Compile the model (torch.compile).")] = False,
    checkpointing: Annotated[bool, _option("checkpointing", text="Compute activations twice to keep fewer.")] = False,
    num_workers: Annotated[int, _option("num-workers", text="Processes that prepare data.", min=0)] = 0,
    device: Annotated[str, _option("device", text="cpu or cuda; cuda where there is one, unless given.")] = "",
    qk_rank: Annotated[int | None, _option("qk-rank", text="Of query-key products.", panel=_RANKS, min=1)] = None,
    ov_rank: Annotated[int | None, _option("ov-rank", text="Of output-value products.", panel=_RANKS, min=1)] = None,
    ffn_rank: Annotated[int | None, _option("ffn-rank", text="Of feed-forward matrices.", panel=_RANKS, min=1)] = None,
    embedding_rank: Annotated[
        int | None, _option("embedding-rank", text="Of the word embedding.", panel=_RANKS, min=1)
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
    your own data and launcher give a training script `--profile_steps 10`.
    """
    with session(as_json=False, debug=debug) as terminal:
        from hf_fnl.planning import fresh_model
        from hf_fnl.training import FLAMBeTrainingArguments

        _check_device(device)
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
            "use_cpu": device == "cpu",
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
            from hf_fnl.training.files import write_text

            write_text(json_file, json.dumps({"model": model, "ranks": ranks, **found.as_dict()}, indent=2) + "\n")
        terminal.show({}, *_views(model, found))


def _check_device(device: str) -> None:
    import torch

    if device not in ("", "cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, and torch sees no GPU here; leave --device out, or take cpu")


def _train(model: Any, length: int, arguments: Any, options: dict[str, Any]) -> Profile:
    """Train a few steps, leaving no file."""
    import tempfile

    from transformers import PrinterCallback, default_data_collator

    from hf_fnl.planning.examples import random_examples
    from hf_fnl.training import FLAMBeTrainer

    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
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
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(("where the time goes", "ms", "share")):
        table.add_column(column, justify="right" if number else "left")
    *phases, step = found.rows()
    for row in phases:
        table.add_row(*row)
    table.add_row(*step, style="bold")
    return table
