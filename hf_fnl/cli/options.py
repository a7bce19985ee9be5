"""Arguments and options that several commands have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

RANKS = ("qk_rank", "ov_rank", "ffn_rank", "qkv_rank", "embedding_rank")


def given(context: typer.Context, names: Iterable[str]) -> dict[str, Any]:
    """Return those of some options of a command that have a value."""
    return {name: context.params[name] for name in names if context.params[name] is not None}


def _rank(text: str) -> Any:
    return typer.Option(metavar="N", help=text, rich_help_panel="Ranks by kind")


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or its id on the Hub.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write. It appears whole, or not at all.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
QkRank = Annotated[int | None, _rank("Rank of each head's query-key product.")]
OvRank = Annotated[int | None, _rank("Rank of each head's output-value product.")]
FfnRank = Annotated[int | None, _rank("Rank of the feed-forward matrices.")]
QkvRank = Annotated[int | None, _rank("Rank of the matrix of queries, keys and values together, of GPT-2.")]
EmbeddingRank = Annotated[int | None, _rank("Rank of the word embedding.")]
