"""``hf-fnl plan``: its options, and a plan as a person reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fnl.cli.terminal import option, session, usage

if TYPE_CHECKING:
    from rich.table import Table

    from hf_fnl.planning import Plan

GIB, MIB = 2**30, 2**20
_RANKS = "Ranks"


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="bert-base, bert-large, gpt2, gpt2-medium, gpt2-large, gpt2-xl, marian; or a model's folder or "
            "config.json.",
        ),
    ],
    gpus: Annotated[int, option("gpus", "All GPUs of the run.", min=1)] = 1,
    engine: Annotated[str, option("engine", "ddp, zero1, zero2, hsdp, fsdp2 or zero3.")] = "ddp",
    gpus_per_node: Annotated[int, option("gpus-per-node", "GPUs of a machine.", min=1)] = 8,
    nodes: Annotated[
        int | None, option("nodes", "Machines; then --gpus is their number times --gpus-per-node.", min=1)
    ] = None,
    batch_size: Annotated[int, option("batch-size", "Sequences of a GPU in a forward pass.", min=1)] = 8,
    sequence_length: Annotated[int, option("sequence-length", "Tokens of a sequence.", min=1)] = 128,
    accumulation: Annotated[int, option("accumulation", "Forward passes of a step.", min=1)] = 1,
    dtype: Annotated[str, option("dtype", "fp32, or bf16 for mixed precision.")] = "bf16",
    optimizer: Annotated[str, option("optimizer", "flambe, lamb or adamw_torch.")] = "flambe",
    frobenius_decay: Annotated[
        str, option("frobenius-decay", "Kinds of products that flambe decays, with commas between.")
    ] = "ov",
    offload: Annotated[bool, option("offload", "State of the optimizer in the memory of the host.")] = False,
    checkpointing: Annotated[bool, option("checkpointing", "Compute activations twice to keep fewer.")] = False,
    memory: Annotated[float | None, option("memory", "GiB of a GPU: does it fit, and which engine does?")] = None,
    qk_rank: Annotated[int | None, option("qk-rank", "Of each head's query-key product.", _RANKS, min=1)] = None,
    ov_rank: Annotated[int | None, option("ov-rank", "Of each head's output-value product.", _RANKS, min=1)] = None,
    ffn_rank: Annotated[int | None, option("ffn-rank", "Of the feed-forward matrices.", _RANKS, min=1)] = None,
    embedding_rank: Annotated[int | None, option("embedding-rank", "Of the word embedding.", _RANKS, min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """What training a model costs on N GPUs: memory, bytes sent and operations of a step, for one GPU.

    The model is built without weights; nothing is downloaded and no GPU is needed. What PyTorch itself and its
    allocator take comes on top: --memory reserves a tenth.
    """
    if nodes is not None and gpus not in (1, nodes * gpus_per_node):
        raise typer.BadParameter(f"{nodes} nodes of {gpus_per_node} GPUs are not --gpus {gpus}; leave one of them out")
    with session(as_json=as_json, debug=debug) as terminal:
        import hf_fnl.planning as planning

        with usage():
            setup = planning.Setup(
                engine=engine,
                gpus=gpus if nodes is None else nodes * gpus_per_node,
                gpus_per_node=gpus_per_node,
                batch_size=batch_size,
                sequence_length=sequence_length,
                accumulation=accumulation,
                dtype=dtype,
                optimizer=optimizer,
                frobenius_decay=tuple(filter(None, frobenius_decay.replace(" ", "").split(","))),
                offload=offload,
                checkpointing=checkpointing,
            )
        ranks = {"qk_rank": qk_rank, "ov_rank": ov_rank, "ffn_rank": ffn_rank, "embedding_rank": embedding_rank}
        found = planning.plan(
            lambda: planning.meta_model(model, **ranks), setup, limit=None if memory is None else memory * GIB
        )
        terminal.show({"model": model, "ranks": ranks, **found.as_dict()}, *_views(model, found))


def _views(model: str, found: Plan) -> list[Any]:
    setup = found.setup
    title = f"{model}: {found.facts.parameters:,} parameters, {setup.engine} on {setup.gpus} GPUs, {setup.dtype}"
    views: list[Any] = [title, "", _memory(found), "", _traffic(found), "", _flops(found)]
    return views if found.limit is None else [*views, "", _verdict(found)]


def _memory(found: Plan) -> Table:
    table = _table("memory of a GPU", "GiB")
    held = found.memory
    for name in ("parameters", "gradients", "optimizer", "activations", "buffers", "workspace"):
        table.add_row(name, f"{getattr(held, name) / GIB:.2f}")
    table.add_row("at the peak", f"{held.total / GIB:.2f}", style="bold")
    if held.host:
        table.add_row("in the host's memory", f"{held.host / GIB:.2f}")
    return table


def _traffic(found: Plan) -> Table:
    table = _table("sent by a GPU in a step", "how", "tensors, MiB", "sent, MiB")
    for message in found.messages:
        how = f"{message.collective} of {message.group}"
        table.add_row(message.purpose, how, f"{message.payload / MIB:,.3f}", f"{message.sent / MIB:,.3f}")
    table.add_row("all", "", "", f"{sum(m.sent for m in found.messages) / MIB:,.3f}", style="bold")
    return table


def _flops(found: Plan) -> Table:
    table = _table("operations of a step", "GFLOPs, all GPUs", "GFLOPs, each")
    for name, count in (*found.flops.items(), ("all", sum(found.flops.values()))):
        table.add_row(name, f"{count / 1e9:,.1f}", f"{count / 1e9 / found.setup.gpus:,.1f}")
    return table


def _verdict(found: Plan) -> str:
    assert found.limit is not None
    fits = "fits" if found.fits else "does not fit"
    smallest = f"{found.smallest} is the first that does" if found.smallest else "no engine does; take fewer sequences"
    engines = "" if found.fits and found.smallest == found.setup.engine else f"; from ddp to zero3, {smallest}"
    return f"{found.setup.engine} {fits} into {found.limit / GIB:g} GiB, a tenth of which is reserved{engines}"


def _table(*columns: str) -> Table:
    from rich.table import Table  # which --help does not wait for

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column != "how" else "left")
    return table
