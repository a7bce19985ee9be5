"""``hf-fnl plan``: its options, and what they print."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fnl.cli.options import RANKS, Debug, EmbeddingRank, FfnRank, Json, OvRank, QkRank, QkvRank, given
from hf_fnl.cli.tables import new_table, share_left
from hf_fnl.cli.terminal import session

if TYPE_CHECKING:
    from rich.table import Table


def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="bert-base, bert-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, marian; or a model's folder or "
            "config.json.",
        ),
    ],
    gpus: Annotated[int, typer.Option(help="One process for each.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Sequences of a process in a forward pass.", min=1)] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 for mixed precision.")] = "bf16",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute activations twice to keep fewer.")
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="GiB of a GPU: which engines fit, with a tenth to spare?")
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="Share of all parameters that stay; linear layers are factorized.", min=0.0, max=1.0),
    ] = None,
    qk_rank: QkRank = None,
    ov_rank: OvRank = None,
    ffn_rank: FfnRank = None,
    qkv_rank: QkvRank = None,
    embedding_rank: EmbeddingRank = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what training a model costs: parameters, operations of a step, and memory of a process under every engine.

    A factorized model stands beside the dense one. The model is built without weights; nothing is downloaded and no
    GPU is needed. The formulas are in hf_fnl/planning.py.
    """
    with session(context, as_json=as_json, debug=debug) as terminal:
        import hf_fnl.planning as planning

        with terminal.usage():
            setup = planning.Setup(
                processes=gpus,
                batch_size=batch_size,
                sequence_length=sequence_length,
                dtype=dtype,
                checkpointing=checkpointing,
            )
        asked = planning.meta_model(model, ratio=ratio, **given(context, RANKS))
        dense = planning.meta_model(model, dense=True)
        models = {"dense": dense}
        if sum(p.numel() for p in asked.parameters()) != sum(p.numel() for p in dense.parameters()):
            models["factorized"] = asked
        found = {}
        for name, each in models.items():
            cost = planning.cost_of(each, setup)
            memories = {engine: planning.memory_of(cost, setup, engine) for engine in planning.ENGINES}
            found[name] = {**asdict(cost), "memory": memories}
        terminal.show(
            {"model": model, "ranks": given(context, (*RANKS, "ratio")), "setup": asdict(setup), **found},
            f"{model}: processes: {gpus}, {batch_size} x {sequence_length} tokens in each, {dtype}\n",
            _step(found),
            "",
            _memory(found, planning.GIB, memory),
        )


def _step(found: dict[str, Any]) -> Table:
    table = new_table("a step of a process", *found)
    dense = found["dense"]["parameters"]
    table.add_row("parameters", *(f"{each['parameters']:,}" for each in found.values()))
    table.add_row("share left", *(share_left(each["parameters"] / dense) for each in found.values()))
    for name in ("forward", "backward"):
        table.add_row(f"{name}, GFLOPs", *(f"{each[name] / 1e9:,.1f}" for each in found.values()))
    return table


def _memory(found: dict[str, Any], gib: int, limit: float | None) -> Table:
    """A row for each engine and model: what a process holds, in GiB."""
    names = ("weights", "gradients", "optimizer", "activations", "buffers", "total")
    table = new_table(
        "memory of a process, GiB", "", *names, *([] if limit is None else [f"fits {limit:g}"]), left=("",)
    )
    for engine in next(iter(found.values()))["memory"]:
        for number, (form, each) in enumerate(found.items()):
            parts = each["memory"][engine]
            fits = [] if limit is None else ["yes" if parts["total"] <= 0.9 * limit * gib else "no"]
            shown = (f"{parts[name] / gib:.2f}" for name in names)
            table.add_row("" if number else engine, form, *shown, *fits)
    return table
