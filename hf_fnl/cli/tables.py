"""Tables of the results of commands."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_fnl.cli.groups import groups_of, module_of
from hf_fnl.utils.suggest import printable

if TYPE_CHECKING:
    from rich.table import Table

ABSENT = "-"

_COLUMNS = ("product", "kind", "shape", "rank", "parameters", "norm", "eff. rank", "energy")
_LEFT = ("kind", "shape")
LAYERS_KEY = "before, after: parameters, and the share left; energy: share of the squared Frobenius norm kept"


def matrices_table(rows: Sequence[Mapping[str, Any]], parameters: int, *, every: bool = False) -> Table:
    """One line for the matrices of one shape in one place, one for the model's other parameters, and the total.

    What lies in one module stands below its name; norms, effective ranks and energies are means.

    Args:
        rows: The matrices.
        parameters: Of the model, tied ones once.
        every: Give each matrix a line of its own.
    """
    table = new_table(*_COLUMNS, left=_LEFT, footer=True)
    groups = [(row["name"], [row]) for row in rows] if every else groups_of(rows)
    for above, inside in itertools.groupby(groups, lambda group: module_of(group[0])):
        several = list(inside)
        if is_under := bool(above) and len(several) > 1:
            table.add_row(printable(above))
        for name, members in several:
            table.add_row(printable(f"  {name[len(above) + 1 :]}" if is_under else name), *_figures(members))
    if rest := parameters - sum(row["parameters"] for row in rows):
        table.add_row("biases, norms, others", "dense", "", "", _cell(rest))
    for column, total in zip(table.columns, (f"all {len(rows)} matrices", "", "", "", _cell(parameters)), strict=False):
        column.footer = total
    return table


def _figures(members: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the cells of a row: what some matrices have in common, and the sums and means of the rest."""
    yield _cell(members[0]["kind"])
    yield _cell(members[0]["shape"])
    yield _span([row["rank"] for row in members])
    yield _cell(sum(row["parameters"] for row in members))
    for field in ("frobenius_norm", "effective_rank", "energy"):
        yield _mean([row[field] for row in members])


def layers_table(layers: Sequence[Mapping[str, Any]], before: int, after: int) -> Table:
    """One line for the factorized layers of each kind and shape, one for what stays dense, and the total.

    :data:`LAYERS_KEY` says what its columns are.

    Args:
        layers: What was factorized.
        before: Parameters of the model before, tied ones once.
        after: Parameters afterwards.
    """
    columns = ("kind", "shape", "layers", "rank", "before", "after", "left", "energy")
    table = new_table(*columns, left=_LEFT, footer=True)
    groups: dict[tuple[str, tuple[int, ...]], list[Mapping[str, Any]]] = {}
    for layer in layers:
        groups.setdefault((layer["kind"], tuple(layer["shape"])), []).append(layer)
    for (kind, shape), members in groups.items():
        rank, energy = _span([layer["rank"] for layer in members]), _mean([layer["energy"] for layer in members])
        table.add_row(_cell(kind), _cell(shape), str(len(members)), rank, *_sizes(*_counts(members)), energy)
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


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _cell(sum(known) / len(known) if known else None)


def _counts(layers: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    return tuple(sum(layer[f"parameters_{when}"] for layer in layers) for when in ("before", "after"))


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", share_left(after / before) if before else ABSENT


def new_table(*names: str, left: Sequence[str] = (), footer: bool = False) -> Table:
    """Return an empty table without lines; the first column and those in ``left`` begin at the left."""
    from rich.table import Table  # which --help does not wait for

    styles: dict[str, Any] = {"header_style": "bold", "footer_style": "bold"}
    table = Table(box=None, show_footer=footer, pad_edge=False, collapse_padding=True, **styles)
    for number, name in enumerate(names):  # names are folded where the terminal is narrow, figures are not
        aligned: Any = "left" if number == 0 or name in left else "right"
        table.add_column(name, justify=aligned, overflow="fold", no_wrap=number > 0)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(value)
