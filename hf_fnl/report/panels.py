"""What a plot shows, as plain data: its lines, their range, and the legend that explains them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hf_fnl.report.series import Place, Series, role_of
from hf_fnl.report.sources import Points, Source

Point = TypeVar("Point")

# Legible on white and on black alike, and told apart with any kind of colour vision (after Okabe and Ito).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#c5699b", "#7f7f7f")
INK = "#1c1e21"  # of text, axes and means; a page puts its own text colour in its place
_MAX_POINTS = 200  # of a line: more cannot be told apart at the width of a plot
_RAMP = ((42, 120, 214), (150, 92, 150), (214, 98, 20))


@dataclass(frozen=True)
class Line:
    """A line of a plot. Bold ones are what it says, the others show where that comes from."""

    label: str
    points: Points
    colour: str
    bold: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """The range of several lines: ``(x, lowest, highest)``."""

    points: list[tuple[float, float, float]]
    colour: str


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    bands: list[Band]
    log: bool = False
    from_zero: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    label: str
    colour: str
    dashed: bool = False
    band: bool = False


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """What plots show.

    Args:
        heading: Its name.
        meaning: Its formula, where that comes from, and how to read the plots; HTML.
        xlabel: What it is plotted against.
        ylabel: Label of its axis.
        series_of: Its points in a source.
        dashed: Points of a second quantity beside it.
        line_styles: What solid and dashed lines are.
        log: Whether its axis is logarithmic.
        from_zero: Whether its axis starts at zero.
    """

    heading: str
    meaning: str
    xlabel: str
    ylabel: str
    series_of: Callable[[Source], Series]
    dashed: Callable[[Source], Series] | None = None
    line_styles: tuple[str, str] | None = None
    log: bool = False
    from_zero: bool = False


def make_panels(sources: Sequence[Source], quantity: Quantity) -> list[Panel]:
    """One panel for each role: the mean over its matrices and, where there are several, what it is a mean of.

    With one source every matrix is a thin line, coloured by its place between input and output; with several, each
    source has a colour and the range of its matrices is shaded. Of the second quantity the mean is shown.
    """
    solid = [quantity.series_of(source) for source in sources]
    dashed = [quantity.dashed(source) if quantity.dashed else {} for source in sources]
    colours = _place_colours(matrices for series in solid for matrices in series.values() if len(matrices) > 1)
    panels = []
    for role in dict.fromkeys(role for series in solid for role in series):
        lines: list[Line] = []
        bands: list[Band] = []
        for source, colour, first, second in zip(sources, source_colours(sources), solid, dashed, strict=True):
            matrices = first.get(role, {})
            if len(matrices) > 1 and len(sources) == 1:
                lines += [
                    Line(name, _thinned(points), colours[role_of(name)[1]], bold=False)
                    for name, points in matrices.items()
                ]
            elif len(matrices) > 1 and (shared := _shared(matrices)):
                bands.append(Band(_thinned([(x, min(ys), max(ys)) for x, ys in shared]), colour))
            lines += _mean(source.name, matrices, colour)
            lines += _mean(source.name, second.get(role, {}), colour, dashed=True)
        if lines:
            axes = (quantity.log, quantity.from_zero)
            panels.append(Panel(role, quantity.xlabel, quantity.ylabel, lines, bands, *axes))
    return panels


def source_colours(sources: Sequence[Source]) -> tuple[str, ...]:
    """The colour of each source: that of text where there is only one."""
    return (INK,) if len(sources) == 1 else PALETTE[: len(sources)]


def legend_of(sources: Sequence[Source], panels: Sequence[Panel]) -> list[Key]:
    """What the colours of panels mean."""
    drawn = {line.colour for panel in panels for line in panel.lines}
    named = zip(sources, source_colours(sources), strict=True)
    keys = [Key(source.name, colour) for source, colour in named if colour in drawn]
    if any(panel.bands for panel in panels):
        return [*(Key(f"{key.label}, mean", key.colour) for key in keys), Key("range of the layers", INK, band=True)]
    thin = {role_of(line.label)[1]: line.colour for panel in panels for line in panel.lines if not line.bold}
    if not thin:
        return keys if len(sources) > 1 else []
    places = sorted(thin)
    shown = sorted({places[0], places[len(places) // 2], places[-1]})
    return [Key("mean", INK), *(Key(f"layer {'.'.join(map(str, place))}", thin[place]) for place in shown)]


def _place_colours(roles: Iterable[Iterable[str]]) -> dict[Place, str]:
    """One colour for each place in a model, the same in all plots, from the input to the output."""
    places = sorted({role_of(name)[1] for names in roles for name in names})
    return {place: _ramp(index / max(len(places) - 1, 1)) for index, place in enumerate(places)}


def _mean(label: str, matrices: dict[str, Points], colour: str, dashed: bool = False) -> list[Line]:
    points = [(x, sum(ys) / len(ys)) for x, ys in _shared(matrices)]
    return [Line(label, _thinned(points), colour, dashed=dashed)] if points else []


def _thinned(points: list[Point]) -> list[Point]:
    """Evenly chosen points, the first and the last among them."""
    count = min(len(points), _MAX_POINTS)
    return [points[i * (len(points) - 1) // max(count - 1, 1)] for i in range(count)]


def _shared(matrices: dict[str, Points]) -> list[tuple[float, list[float]]]:
    """The values of all matrices, where all have one: a mean over fewer would jump where a smaller rank ends."""
    values: dict[float, list[float]] = {}
    for points in matrices.values():
        for x, y in points:
            values.setdefault(x, []).append(y)
    return sorted((x, ys) for x, ys in values.items() if len(ys) == len(matrices))


def _ramp(position: float) -> str:
    """A colour between blue and orange, of a lightness that shows on white and on black."""
    first, second = (_RAMP[0], _RAMP[1]) if position < 0.5 else (_RAMP[1], _RAMP[2])
    share = position * 2 % 1 if position < 1 else 1.0
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(first, second, strict=True))
