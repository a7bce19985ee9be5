"""Plots drawn with matplotlib, which is imported here alone and only when something is drawn."""

from __future__ import annotations

import contextlib
import html
import importlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_fnl.report.panels import INK, Key, Panel

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched, and follows the page's font
    "svg.hashsalt": "hf_fnl",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "text.parse_math": False,  # names may hold dollars
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


def require_matplotlib() -> None:
    """Raise unless plots can be drawn.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra that holds it.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is in an extra: pip install 'hf_fnl[plots]'") from error


def draw_svg(panel: Panel, number: int) -> str:
    """A panel as an SVG element to stand in a page; its text takes the colour and the font of the page.

    Args:
        panel: What to draw; the title is left to the page.
        number: Which of the page's plots it is, for ids that no other plot has.
    """
    with _figure(1, 1, (11.5, 3.2) if panel.wide else (3.9, 2.5)) as (figure, axes):
        _draw(axes[0], panel)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    opening = f'<svg {box[0]} role="img" aria-label="{html.escape(describe(panel))}">'
    svg = opening + re.sub(r"\s*<style.*?</style>", "", svg[svg.index(">") + 1 :], flags=re.DOTALL)
    svg = re.sub(r'xlink:href="#|id="|url\(#', lambda match: f"{match[0]}p{number}-".replace("xlink:", ""), svg)
    return re.sub(r"font: [^;\"]*;?", "", svg).replace(INK, "currentColor")


def draw_png(panels: Sequence[Panel], legend: Sequence[Key], target: str | Path, *, columns: int) -> Path:
    """Panels side by side in one picture, with their titles and a legend."""
    target = Path(target)
    rows = -(-len(panels) // columns)
    with _figure(rows, columns, (4.5 * columns, 3 * rows)) as (figure, axes):
        from matplotlib.lines import Line2D

        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel)
            axis.set_title(panel.title, fontsize="medium")
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        handles = [Line2D([], [], color=k.colour, linestyle="--" if k.dashed else "-", label=k.label) for k in legend]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=3 * columns, frameon=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="png", dpi=120)
    return target


def describe(panel: Panel) -> str:
    """A plot in words: where its bold lines start and end."""
    lines = []
    for line in panel.lines:
        if line.bold:
            (start, first), (end, last) = line.points[0], line.points[-1]
            dashed = ", dashed" if line.dashed else ""
            lines.append(f"{line.label}{dashed}: {first:.3g} at {start}, {last:.3g} at {end}")
    return f"{panel.title}: {panel.ylabel} against {panel.xlabel}. {'; '.join(lines)}."


@contextlib.contextmanager
def _figure(rows: int, columns: int, size: tuple[float, float]) -> Iterator[tuple[Any, list[Any]]]:
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _draw(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for band in panel.bands:
        x, low, high = zip(*band.points, strict=True)
        axis.fill_between(x, low, high, color=band.colour, alpha=0.18, linewidth=0)
    for line in panel.lines:
        style = {"linestyle": (0, (4, 2)) if line.dashed else "-", "linewidth": 1.7 if line.bold else 0.8}
        marker = "o" if line.bold and len(line.points) < 12 else None
        alpha = 1 if line.bold else 0.75
        axis.plot(*zip(*line.points, strict=True), color=line.colour, marker=marker, markersize=3, alpha=alpha, **style)
    axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    whole = all(isinstance(x, int) for line in panel.lines for x, _ in line.points)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=whole, steps=[1, 2, 5, 10]))
    if panel.log:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
    if panel.from_zero:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter("{x:g}")
