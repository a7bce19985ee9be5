"""How a cost grows: measured at several sizes, beside the growth of its limit, and drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.timing import Case, interleave
from hf_fnl.training.command_line import tracked

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Sweep:
    """A cost against a size.

    Args:
        title: What is measured.
        xlabel: The size.
        ylabel: The cost and its unit.
        lines: Measured costs, by name.
        limits: What the costs could be at least, by name.
        note: Why something grows faster than its limit.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, Points]
    limits: Mapping[str, Points]
    note: str = ""

    def record(self) -> dict[str, Any]:
        """All of it, and the power of the size with which every line and limit grows between its two largest halves."""
        grows = {name: growth(points) for name, points in {**self.lines, **self.limits}.items()}
        return {**asdict(self), "grows_with_power": grows}


def time_sweep(
    title: str,
    xlabel: str,
    sizes: Iterable[float],
    cases: Callable[[Any], Mapping[str, Case]],
    limit: Callable[[Any], Mapping[str, float]],
    *,
    device: str,
    rounds: int,
    note: str = "",
) -> Sweep:
    """Time cases at several sizes.

    Args:
        title: What is measured.
        xlabel: The size.
        sizes: At least three.
        cases: Makes what is timed at a size.
        limit: Seconds that a size takes at least, by name of the limit.
        device: Where it runs.
        rounds: Timed rounds at each size.
        note: Why something grows faster than its limit.
    """
    lines: dict[str, Points] = {}
    limits: dict[str, Points] = {}
    for size in tracked(list(sizes), title):
        seconds = interleave(cases(size), device, rounds=rounds)
        for name, values in seconds.items():
            lines.setdefault(name, []).append((size, 1e3 * median(values)))
        for name, least in limit(size).items():
            limits.setdefault(name, []).append((size, 1e3 * least))
    return Sweep(title, xlabel, "milliseconds", lines, limits, note)


def growth(points: Points) -> float | None:
    """Slope in logarithms over the larger half of the sizes, where constant costs count least."""
    upper = points[len(points) // 2 - (len(points) == 2) :] if len(points) > 2 else points
    (x, first), (y, last) = upper[0], upper[-1]
    if not 0 < x < y or first <= 0 or last <= 0:
        return None
    return math.log(last / first) / math.log(y / x)


def draw(records: Sequence[Mapping[str, Any]], target: Path) -> Path:
    """Draw recorded sweeps side by side: costs as lines, limits dashed, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    columns = min(3, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, record in zip(axes, records, strict=False):
        for number, (name, points) in enumerate(record["lines"].items()):
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=f"C{number}", label=name)
        for number, (name, points) in enumerate(record["limits"].items()):
            axis.plot(*zip(*points, strict=True), linestyle="--", color=f"{0.2 + 0.2 * number:.1f}", label=name)
        axis.set(xlabel=record["xlabel"], ylabel=record["ylabel"], xscale="log", yscale="log")
        sizes = sorted({size for points in record["lines"].values() for size, _ in points})
        for each, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            each.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)))
            each.set_major_formatter(StrMethodFormatter("{x:g}"))
            each.set_minor_locator(NullLocator())
        if all(larger > 1.4 * size for size, larger in pairwise(sizes)):
            axis.set_xticks(sizes)
        axis.set_title(record["title"], fontsize="medium")
        axis.legend(fontsize="small", frameon=False)
    for axis in axes[len(records) :]:
        axis.set_axis_off()
    figure.savefig(target, format="png", dpi=110)
    return target
