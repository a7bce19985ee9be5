"""Rows as tables of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a Markdown table, in the order in which their keys first appear; keys without any value are left out."""
    columns = _columns(rows)
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def without_origin(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without their commands and commits, which tables do not show."""
    return [{key: row[key] for key in row if not key.startswith(("command", "commit"))} for row in rows]


def workload_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows as Markdown tables: one for all workloads of which the same is known."""
    workloads: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        workloads.setdefault(row.get("workload"), []).append(row)
    alike: dict[frozenset[str], list[dict[str, Any]]] = {}
    for rows_of_one in workloads.values():
        alike.setdefault(frozenset(_columns(rows_of_one)), []).extend(rows_of_one)
    return [markdown_table(group) for group in alike.values()]


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return [key for key in keys if any(row.get(key) is not None for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
