"""Plots drawn with matplotlib, which is imported here alone and only when something is drawn."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from hf_fnl.report.sections import Panel
from hf_fnl.utils.extras import require

_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the reader's fonts
    "svg.hashsalt": "hf_fnl",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "text.parse_math": False,  # names may hold dollars
}


def require_matplotlib() -> None:
    """Raise an ``ImportError`` that names the extra unless plots can be drawn."""
    require("matplotlib", "plots are drawn by", "hf_fnl[plots]")


def draw(panels: Sequence[Panel], kind: str = "svg") -> bytes:
    """Return panels side by side as a file of a kind that matplotlib writes, such as ``"svg"`` or ``"png"``."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(4 * columns, 2.8 * rows + 0.3), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        keys = {line.label: line for panel in panels for line in panel.lines if line.label}
        handles = [
            Line2D([], [], color=key.colour, linestyle="--" if key.dashed else "-", label=key.label)
            for key in keys.values()
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, frameon=False)
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=120, metadata=metadata)
    return buffer.getvalue()


def describe(panel: Panel) -> str:
    """Return a plot in words: where its lines start and end."""
    lines = []
    for line in panel.lines:
        (start, first), (end, last) = line.points[0], line.points[-1]
        lines.append(f"{line.label or panel.ylabel}: {first:.3g} at {start}, {last:.3g} at {end}")
    return f"{panel.title}: {panel.ylabel} against {panel.xlabel}. {'; '.join(lines)}."


def _draw(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for line in panel.lines:
        if line.band:
            axis.fill_between(*zip(*line.band, strict=True), color=line.colour, alpha=0.18, linewidth=0)
        marker = "o" if len(line.points) < 12 else None
        style = {"linestyle": "--" if line.dashed else "-", "marker": marker, "markersize": 3}
        axis.plot(*zip(*line.points, strict=True), color=line.colour, **style)
    axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, yscale="log" if panel.log else "linear")
    axis.set_title(textwrap.fill(panel.title, 44), fontsize="medium")
    whole = all(isinstance(x, int) for line in panel.lines for x, _ in line.points)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10]))
    if panel.log:
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:g}")
