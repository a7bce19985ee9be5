"""Plots drawn with matplotlib, which is imported here alone and only when something is drawn."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
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


def draw_svg(panels: Sequence[Panel]) -> bytes:
    """Return panels side by side as an SVG file."""
    with _figure(panels, columns=min(3, len(panels))) as figure:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def draw_png(panels: Sequence[Panel], target: str | Path, *, columns: int) -> Path:
    """Write panels side by side as a picture."""
    target = Path(target)
    with _figure(panels, columns=columns) as figure:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="png", dpi=120)
    return target


def describe(panel: Panel) -> str:
    """Return a plot in words: where its lines start and end."""
    lines = []
    for line in panel.lines:
        (start, first), (end, last) = line.points[0], line.points[-1]
        lines.append(f"{line.label or panel.ylabel}: {first:.3g} at {start}, {last:.3g} at {end}")
    return f"{panel.title}: {panel.ylabel} against {panel.xlabel}. {'; '.join(lines)}."


@contextlib.contextmanager
def _figure(panels: Sequence[Panel], *, columns: int) -> Iterator[Any]:
    """Panels with their titles above one legend of all their lines."""
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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
            Line2D([], [], color=k.colour, linestyle="--" if k.dashed else "-", label=k.label) for k in keys.values()
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, frameon=False)
        yield figure


def _draw(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in panel.lines:
        if line.band:
            axis.fill_between(*zip(*line.band, strict=True), color=line.colour, alpha=0.18, linewidth=0)
        marker = "o" if len(line.points) < 12 else None
        style = {"linestyle": "--" if line.dashed else "-", "marker": marker, "markersize": 3}
        axis.plot(*zip(*line.points, strict=True), color=line.colour, **style)
    axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel, yscale="log" if panel.log else "linear")
    axis.set_title(panel.title, fontsize="medium")
    whole = all(isinstance(x, int) for line in panel.lines for x, _ in line.points)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10]))
    if panel.from_zero:
        axis.set_ylim(bottom=0)
