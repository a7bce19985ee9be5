"""Tables of grids: means over seeds, and paired differences with Student's t.

A pair ``[cell, other, measure, expected]`` compares two cells over the seeds that both have. ``expected`` is ``"+"`` if
the first is expected to be larger, ``"-"`` if smaller, and ``"=0.5"`` if they are expected to differ by less than 0.5.
It is *seen* if the 95 % confidence interval of the mean difference lies where it is expected, *not seen* if it lies
outside of that, and *not decided* if it lies in both, or if there are fewer than two seeds. For ``"+"`` and ``"-"``
that is the two-sided test at 5 %: not decided where ``|t|`` is below the critical value.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.grid_runs import Plan

# Two-sided 5 % critical values of Student's t with 1 to 30 degrees of freedom.
CRITICAL = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
SEEN, NOT_SEEN, NOT_DECIDED = "seen", "not seen", "not decided"

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by cell and seed


def critical_t(degrees: int) -> float:
    """Return the two-sided 5 % critical value; beyond 30 degrees of freedom that of 30, which is larger."""
    return CRITICAL[min(degrees, len(CRITICAL)) - 1]


def paired_difference(differences: Sequence[float], expected: str) -> dict[str, Any]:
    """Test the mean of paired differences.

    Args:
        differences: One for each seed.
        expected: ``"+"``, ``"-"`` or ``"=margin"``.

    Returns:
        ``n``, ``mean``, ``std`` (of the sample), ``t`` (``mean sqrt(n) / std``), ``critical_t``, all ``None`` where
        they are undefined, and the ``verdict``.

    Raises:
        ValueError: If ``expected`` is none of these.
    """
    low_limit, high_limit = _limits(expected)
    n = len(differences)
    mean = statistics.fmean(differences) if n else None
    found: dict[str, Any] = {"n": n, "mean": mean, "std": None, "t": None, "critical_t": None, "verdict": NOT_DECIDED}
    if n < 2 or mean is None:
        return found
    std, critical = statistics.stdev(differences), critical_t(n - 1)
    error = std / math.sqrt(n)
    low, high = mean - critical * error, mean + critical * error
    verdict = NOT_DECIDED
    if low_limit < low and high < high_limit:
        verdict = SEEN
    elif high < low_limit or low > high_limit:
        verdict = NOT_SEEN
    return {**found, "std": std, "t": mean / error if error else None, "critical_t": critical, "verdict": verdict}


def _limits(expected: str) -> tuple[float, float]:
    """Between which numbers a difference is expected."""
    if expected == "+":
        return 0.0, math.inf
    if expected == "-":
        return -math.inf, 0.0
    try:
        margin = float(expected.removeprefix("="))
    except ValueError:
        margin = 0.0
    if not expected.startswith("=") or margin <= 0:
        raise ValueError(f"a pair expects +, - or =MARGIN, such as =0.5; got {expected!r}")
    return -margin, margin


def write_tables(folder: Path, plan: Plan, results: Results) -> dict[str, Any]:
    """Write ``table.json`` and ``table.md`` of a plan from the runs that are done, and return the first."""
    values = {cell: _by_measure(plan, seeds) for cell, seeds in results.items()}
    cells = {
        cell: {measure: _summary(list(by_seed.values())) for measure, by_seed in measures.items()}
        for cell, measures in values.items()
    }
    pairs = [_pair(values, pair) for pair in plan.pairs]
    done = sum(map(len, results.values()))
    found = [result for seeds in results.values() for result in seeds.values()]
    table = {
        **{name: getattr(plan, name) for name in ("title", "paper", "expect", "program")},
        "done": done,
        "runs": len(plan.cells) * len(plan.seeds),
        "commits": sorted({str(result.get("commit")) for result in found}),
        "seconds": sum(result.get("seconds", 0) for result in found),
        "cells": cells,
        "pairs": pairs,
        "values": {
            c: {m: {str(s): v for s, v in seeds.items()} for m, seeds in ms.items()} for c, ms in values.items()
        },
    }
    write_json(folder / "table.json", table)
    write_text(folder / "table.md", _markdown(plan, table))
    return table


def _by_measure(plan: Plan, seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """What each seed measured; what is no finite number is left out."""
    return {
        measure: {
            seed: float(value)
            for seed, result in seeds.items()
            if isinstance(value := result["measures"].get(measure), int | float) and math.isfinite(value)
        }
        for measure in plan.measures
    }


def _summary(values: Sequence[float]) -> dict[str, float | int | None]:
    return {
        "n": len(values),
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _pair(values: Mapping[str, Mapping[str, Mapping[int, float]]], pair: Sequence[str]) -> dict[str, Any]:
    cell, other, measure, expected = (str(entry) for entry in pair)
    left, right = values[cell].get(measure, {}), values[other].get(measure, {})
    differences = [left[seed] - right[seed] for seed in sorted(set(left) & set(right))]
    return {"cell": cell, "other": other, "measure": measure, "expected": expected} | paired_difference(
        differences, expected
    )


def _markdown(plan: Plan, table: Mapping[str, Any]) -> str:
    rows = []
    for cell, measures in table["cells"].items():
        shown = {measure: with_spread(summary) for measure, summary in measures.items()}
        rows.append({"cell": cell, **shown, "n": max((m["n"] for m in measures.values()), default=0)})
    pairs = [
        {"difference": f"{pair['cell']} - {pair['other']}", **{k: v for k, v in pair.items() if k not in _NAMES}}
        for pair in table["pairs"]
    ]
    parts = [f"# {plan.title}", f"The paper: {plan.paper}", f"Expected: {plan.expect}"]
    parts += [
        f"{table['done']} of {table['runs']} runs are done. Means over seeds, with the sample standard deviation."
    ]
    parts += [_table(rows)]
    if pairs:
        parts += ["Paired over seeds; t against its two-sided 5 % critical value.", _table(pairs)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


_NAMES = ("cell", "other")


def with_spread(summary: Mapping[str, Any]) -> str | None:
    """Return a mean with its standard deviation, where there are such."""
    if summary["mean"] is None:
        return None
    return f"{summary['mean']:.4g}" + ("" if summary["std"] is None else f" ± {summary['std']:.2g}")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that appears complete or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that appears complete or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
