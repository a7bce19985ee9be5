"""Rows as tables of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table, in the order in which their keys first appear; keys without any value are left out."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(_has(row, key) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _has(row: dict[str, Any], key: str) -> bool:
    return row.get(key) is not None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
