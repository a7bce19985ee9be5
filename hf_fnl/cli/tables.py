"""What a person sees of a command's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_fnl.utils.suggest import printable

if TYPE_CHECKING:
    from rich.table import Table

ABSENT = "-"


_COLUMNS = {
    "product": "name",
    "kind": "kind",
    "shape": "shape",
    "rank": "rank",
    "parameters": "parameters",
    "FLOPs/position": "flops",
    "Frobenius": "frobenius_norm",
    "nuclear": "nuclear_norm",
    "eff. rank": "effective_rank",
    "energy": "energy",
}
_LEFT = ("product", "kind", "layers", "shape")


def matrices_table(rows: Sequence[Mapping[str, Any]], parameters: int) -> Table:
    """One line for every matrix of a model, one for its other parameters, and the totals.

    Args:
        rows: The matrices.
        parameters: Of the model, tied ones once.
    """
    table = _table(list(_COLUMNS), footer=True)
    for row in rows:
        table.add_row(*(_cell(row[field]) for field in _COLUMNS.values()))
    in_matrices = sum(row["parameters"] for row in rows)
    if rest := parameters - in_matrices:
        others = {"name": "biases, normalizations and others", "kind": "dense", "parameters": rest}
        table.add_row(*(_cell(others.get(field)) for field in _COLUMNS.values()))
    totals = {"name": f"{len(rows)} matrices, all parameters"}
    totals |= {"parameters": f"{parameters:,}", "flops": f"{sum(row['flops'] for row in rows):,}"}
    for column, field in zip(table.columns, _COLUMNS.values(), strict=True):
        column.footer = totals.get(field, "")
    return table


def layers_table(layers: Sequence[Mapping[str, Any]], before: int, after: int) -> Table:
    """One line for the factorized layers of each kind and shape, one for what stays dense, and the total.

    Args:
        layers: What was factorized.
        before: Parameters of the model before, tied ones once.
        after: Parameters afterwards.
    """
    table = _table(["kind", "shape", "layers", "rank", "before", "after", "left", "energy"], footer=True)
    groups: dict[tuple[str, tuple[int, ...]], list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault((layer["kind"], tuple(layer["shape"])), []).append(layer)
    for (kind, shape), members in groups.items():
        ranks = [layer["rank"] for layer in members]
        rank = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        kept = [layer["energy"] for layer in members if layer["energy"] is not None]
        energy = sum(kept) / len(kept) if kept else None
        table.add_row(_cell(kind), _cell(shape), str(len(members)), rank, *_sizes(*_counts(members)), _cell(energy))
    dense = [whole - part for whole, part in zip((before, after), _counts(layers), strict=True)]
    table.add_row("dense", "", "", "", *_sizes(*dense), "")
    for column, total in zip(table.columns, ("all", "", "", "", *_sizes(before, after), ""), strict=True):
        column.footer = total
    return table


def share_left(ratio: float) -> str:
    """A share of parameters as all commands write it."""
    return f"{ratio:.1%}"


def size_change(before: int, after: int) -> str:
    """Two numbers of parameters and their ratio."""
    return f"{before:,} -> {after:,} parameters ({share_left(after / before)})"


def _counts(layers: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    return tuple(sum(layer[f"parameters_{when}"] for layer in layers) for when in ("before", "after"))


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", share_left(after / before) if before else ABSENT


def _table(names: Sequence[str], *, footer: bool = False) -> Table:
    from rich.table import Table  # which --help does not wait for

    table = Table(box=None, show_footer=footer, pad_edge=False, header_style="bold", footer_style="bold")
    for name in names:
        table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(value)
