"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _rank(text: str) -> Any:
    return typer.Option(metavar="N", help=text, rich_help_panel="Ranks by kind")


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model, or its id on the Hub.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write. It appears whole, or not at all.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that holds files.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and no progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
QkRank = Annotated[int | None, _rank("Rank of each head's query-key product.")]
OvRank = Annotated[int | None, _rank("Rank of each head's output-value product.")]
FfnRank = Annotated[int | None, _rank("Rank of the feed-forward matrices.")]
QkvRank = Annotated[int | None, _rank("Rank of the matrix of queries, keys and values together, of GPT-2.")]
EmbeddingRank = Annotated[int | None, _rank("Rank of the word embedding.")]
