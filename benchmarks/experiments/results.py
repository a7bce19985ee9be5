"""Results of rows: JSON with every seed, and a table of ours beside the paper's numbers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.experiments.metrics import measure
from benchmarks.experiments.rows import Row
from benchmarks.experiments.runs import Run, suffix
from benchmarks.harness.machine import machine
from benchmarks.harness.record import write_result
from benchmarks.harness.tables import markdown_table
from hf_fnl.utils.files import write_text

# Figures of a run that stand beside its metrics.
_ALSO = ("eval_loss", "train_loss", "seconds_per_epoch", "seconds", "peak_memory_bytes", "command", "commit")


def add_run(
    folder: Path, run: Run, found: dict[str, Any], command: str, untrained: Sequence[Row] = ()
) -> dict[str, Any]:
    """Add a finished run to the results of its table: JSON, and a table in Markdown beside it.

    Those of the two scales are two files. Seeds of the same row that stand there stay, unless they were trained with
    other settings than this one.

    Args:
        folder: Of all results.
        run: What was run.
        found: Its metrics, command and seconds, as :meth:`Run.train` returns them.
        command: The command that runs the table.
        untrained: Rows of which there are published numbers only; those of this table stand beside the run.

    Returns:
        All that the JSON holds.

    Raises:
        ValueError: If a metric that the table reports was not measured.
    """
    path = folder / f"{run.row.table.name}{suffix(run.scale)}.json"
    table = run.row.table
    figures = measure(table.metrics, run.folder, found) | {key: found[key] for key in _ALSO if key in found}
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cells = result.get("cells", {})
    key = f"{run.row.name} {run.column}"
    cells[key] = _cell(run, cells.get(key), {str(run.seed): figures}, found.get("parameters"))
    for row in untrained:
        if row.table.name == table.name:
            cells |= {f"{row.name} {column}": _published(row, column) for column in row.paper}
    order = {column: number for number, column in enumerate(table.columns)}
    described = machine("cuda" if torch.cuda.is_available() else "cpu")
    result = {
        **{key: result[key] for key in ("committed_in",) if key in result},  # of seeds without a commit of their own
        "title": table.title,
        "scale": run.scale,
        "source": table.source,
        "notes": list(table.notes),
        "command": command,
        "machine": {name: value for name, value in described.items() if name != "threads"},  # this process's
        "cells": dict(sorted(cells.items(), key=lambda item: (item[0].split()[0], order.get(item[1]["column"], -1)))),
    }
    result = write_result(path, result)
    write_text(path.with_suffix(".md"), markdown(result))
    return result


def _cell(
    run: Run, earlier: dict[str, Any] | None, new: dict[str, Any], parameters: dict[str, Any] | None
) -> dict[str, Any]:
    """A row's column with all its seeds."""
    settings = run.settings
    kept = earlier["seeds"] if earlier and earlier["settings"] == settings else {}
    seeds = dict(sorted((kept | new).items(), key=lambda item: int(item[0])))
    published = run.row.published(run.column)
    full = run.row.flags(run.column, "full")
    return {
        "row": run.row.row,
        "column": run.column,
        "settings": settings,
        "instead_of": {flag: full.get(flag) for flag in full | settings if settings.get(flag) != full.get(flag)},
        "source": run.row.source,
        "parameters": parameters,
        "metrics": {
            metric: _summary([figures[metric] for figures in seeds.values()]) | {"paper": published[metric]}
            for metric in run.row.table.metrics
        },
        "seeds": seeds,
    }


def _published(row: Row, column: str) -> dict[str, Any]:
    """A row's column of which nothing is trained."""
    metrics = {name: {"mean": None, "std": None, "paper": value} for name, value in row.published(column).items()}
    known = {"row": row.row, "column": column, "settings": None, "instead_of": {}, "source": row.source}
    return {**known, "parameters": None, "metrics": metrics, "seeds": {}}


def _summary(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def markdown(result: dict[str, Any]) -> str:
    """The results of a table, ours beside the paper's."""
    cells = list(result["cells"].values())
    lines = [f"# {result['title']}", "", markdown_table([_line(cell) for cell in cells]), ""]
    if changes := _changes(cells):
        lines += [f"Scale `{result['scale']}`. Changed from the rows' settings: {changes}.", ""]
    lines += ["Ours is the mean over seeds, with the sample standard deviation.", ""]
    sources = dict.fromkeys(source for source in (result["source"], *(cell["source"] for cell in cells)) if source)
    lines += [f"- {note}" for note in (*(f"Numbers of the paper: {source}" for source in sources), *result["notes"])]
    return "\n".join([*lines, "", f"`{result['command']}`", ""])


def _line(cell: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"row": cell["row"], "column": cell["column"]}
    for metric, summary in cell["metrics"].items():
        spread = "" if summary["std"] is None else f" ± {summary['std']:.2f}"
        mean = None if summary["mean"] is None else f"{summary['mean']:.2f}{spread}"
        line |= {metric: mean, f"{metric}, paper": summary["paper"]}
    parameters = cell["parameters"] or {}
    seconds = [figures["seconds_per_epoch"] for figures in cell["seeds"].values() if figures.get("seconds_per_epoch")]
    return line | {
        "seeds": len(cell["seeds"]) or None,
        "parameters": parameters.get("nonzero", parameters.get("total")),
        "share of dense": parameters.get("ratio"),
        "seconds per epoch": statistics.median(seconds) if seconds else None,
    }


def _changes(cells: list[dict[str, Any]]) -> str:
    """What is not as in the rows at full scale, over all cells."""
    changes: dict[str, dict[str, None]] = {}
    for cell in cells:
        for flag, full in cell["instead_of"].items():
            value = cell["settings"].get(flag, "left out")
            changes.setdefault(flag, {})[f"{value}{'' if full is None else f' instead of {full}'}"] = None
    return "; ".join(f"`{flag}` {', '.join(values)}" for flag, values in changes.items())
