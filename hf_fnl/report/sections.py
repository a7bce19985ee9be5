"""The plots of a report: which quantities they show, with formula and source, as plain data."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain

import torch

from hf_fnl.attention.selectors import KINDS
from hf_fnl.math.factors import marchenko_pastur_values
from hf_fnl.report.inspection import Matrix
from hf_fnl.report.sources import LOSSES, Points, Source

Series = dict[str, dict[str, Points]]  # points by the role of a matrix in the model and by its name

# Told apart with any kind of colour vision (after Okabe and Ito).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#c5699b", "#7f7f7f")
MAX_PANELS = 12
_NUMBER = r"(?<![^.])\d+(?![^.])"
_SMALLEST = 1e-7  # share of the largest singular value below which there is rounding only
# What else a Trainer and our tasks log of an evaluation.
_NOT_METRICS = (LOSSES["evaluation"], "eval_tokens", "eval_words")
_NOT_METRICS_ENDS = ("_runtime", "_per_second", "_time")


@dataclass(frozen=True)
class Line:
    """A line of a plot; ``band`` is the range ``(x, lowest, highest)`` of what it is a mean of."""

    label: str
    points: Points
    colour: str
    dashed: bool = False
    band: list[tuple[float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    xlabel: str
    ylabel: str
    lines: list[Line]
    log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Section:
    """A quantity, how to read its plots (HTML), and the plots."""

    heading: str
    meaning: str
    panels: list[Panel]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity of the matrices of a model, of which there is one plot for each role.

    Args:
        heading: Its name.
        meaning: Its formula, where that comes from, and how to read the plots; HTML.
        axes: What it is plotted against, and the label of its own axis.
        series_of: Its points in a source.
        dashed: Points of a second quantity beside it.
        styles: What solid and dashed lines are.
        log: Whether its axis is logarithmic.
        from_zero: Whether its axis starts at zero.
    """

    heading: str
    meaning: str
    axes: tuple[str, str]
    series_of: Callable[[Source], Series]
    dashed: Callable[[Source], Series] = lambda source: {}
    styles: tuple[str, str] = ("", "")
    log: bool = False
    from_zero: bool = False


def role_of(name: str) -> tuple[str, tuple[int, ...]]:
    """Return what a matrix does, and where it stands: ``("stages.*.*.conv1", (2, 0))`` for ``stages.2.0.conv1``."""
    return re.sub(_NUMBER, "*", name), tuple(map(int, re.findall(_NUMBER, name)))


def by_role(points: Mapping[str, Points]) -> Series:
    """Group the points of matrices by the role of the matrix; those without points are left out."""
    series: Series = {}
    for name, values in points.items():
        if values:
            series.setdefault(role_of(name)[0], {})[name] = values
    return series


def history_of(figure: str) -> Callable[[Source], Series]:
    """Return what reads a figure of :func:`~hf_fnl.optim.diagnostics.diagnose` by step, where it is finite.

    Before the roles stand the means over all products of a kind, which K21 plots; the Trainer logged these.
    """

    def series(source: Source) -> Series:
        points: dict[str, Points] = {}
        for kind in KINDS:
            points[f"all {kind} products"] = list(source.traces.get(f"{kind}/{figure}", []))
        for step, products in source.history:
            for name, figures in products.items():
                points.setdefault(name, []).append((step, figures.get(figure, math.nan)))
        return by_role({name: [point for point in each if math.isfinite(point[1])] for name, each in points.items()})

    return series


def spectra_of(source: Source) -> Series:
    """Return singular values by index, over the largest, of matrices with three or more; means over heads."""
    found: dict[str, Points] = {}
    for matrix in source.matrices:
        values, largest = matrix.singular_values, matrix.singular_values[:, :1]
        shares = torch.where(largest > 0, values / largest, 0).mean(0).tolist()
        if len(shares) > 2:
            found[matrix.name] = [(i, share) for i, share in enumerate(shares, start=1) if share > _SMALLEST]
    return by_role(found)


def gaussian_spectra_of(source: Source) -> Series:
    """Return :func:`spectra_of` of Gaussian matrices of the same shapes, as dense weights are drawn.

    Products of heads are left out: two Gaussian factors make another distribution.
    """
    drawn = [m for m in source.matrices if len(m.singular_values) == 1 and m.singular_values.shape[-1] > 2]
    return by_role({m.name: _gaussian(m.shape, m.singular_values.shape[-1]) for m in drawn})


@cache
def _gaussian(shape: tuple[int, int], count: int) -> Points:
    values = marchenko_pastur_values(shape)[:count]
    return list(enumerate((values / values[0]).tolist(), start=1))


def layers_of(figure: Callable[[Matrix], float]) -> Callable[[Source], Series]:
    """Return what reads a figure by the order from input to output, a line for each role that several matrices have."""

    def series(source: Source) -> Series:
        roles: dict[str, list[tuple[tuple[int, ...], float]]] = {}
        for matrix in source.matrices:
            role, place = role_of(matrix.name)
            roles.setdefault(role, []).append((place, figure(matrix)))
        lines: dict[str, Points] = {
            role: list(enumerate(y for _, y in sorted(rows))) for role, rows in roles.items() if len(rows) > 1
        }
        return {role: {role: points} for role, points in lines.items()}

    return series


IN_TRAINING = (
    Quantity(
        heading="Nuclear norm and its bound",
        meaning="‖W‖<sub>*</sub> = Σσ ≤ ½(‖U‖<sub>F</sub>² + ‖V‖<sub>F</sub>²) for W = UVᵀ (K21, Eq. 2 and Fig. 1). "
        "Ordinary weight decay of the factors holds down the bound; where the two lines meet, it penalizes the nuclear "
        "norm.",
        axes=("step", "norm"),
        series_of=history_of("nuclear_norm"),
        dashed=history_of("nuclear_norm_bound"),
        styles=("nuclear norm", "bound"),
    ),
    Quantity(
        heading="Frobenius norm",
        meaning="‖W‖<sub>F</sub> = √Σσ², which Frobenius decay holds down (K21, Def. 3.2).",
        axes=("step", "Frobenius norm"),
        series_of=history_of("frobenius_norm"),
    ),
    Quantity(
        heading="Effective rank",
        meaning="‖W‖<sub>*</sub> / ‖W‖<sub>op</sub> (K22, Sec. 3.3). It falls when the largest singular value outgrows "
        "the others.",
        axes=("step", "effective rank"),
        series_of=history_of("effective_rank"),
    ),
    Quantity(
        heading="Effective step size",
        meaning="η / ‖W‖<sub>F</sub>², η the learning rate (K21, Sec. 3.3): how far a step turns a matrix whose scale "
        "does not matter.",
        axes=("step", "effective step size"),
        series_of=history_of("effective_step_size"),
    ),
)
OF_THE_MODEL = (
    Quantity(
        heading="Spectra",
        meaning="Singular values in descending order, divided by the largest; of an attention the mean over its heads. "
        "The steeper a line, the less is lost when its end is cut off. Dashed is a Gaussian matrix of the same shape, "
        "as a dense layer is drawn (Marchenko-Pastur; K22, A.1); what training did is how far a line left it.",
        axes=("index i", "singular value / largest"),
        series_of=spectra_of,
        dashed=gaussian_spectra_of,
        styles=("this model", "Gaussian"),
        log=True,
    ),
    Quantity(
        heading="Effective rank by layer",
        meaning="‖W‖<sub>*</sub> / ‖W‖<sub>op</sub> (K22, Sec. 3.3), beside the rank that W can have.",
        axes=("layer", "rank"),
        series_of=layers_of(lambda matrix: matrix.effective_rank),
        dashed=layers_of(lambda matrix: matrix.rank),
        styles=("effective rank", "rank"),
        from_zero=True,
    ),
    Quantity(
        heading="Norms by layer",
        meaning="‖W‖<sub>F</sub> = √Σσ² and ‖W‖<sub>*</sub> = Σσ. The further apart, the more singular "
        "values share the weight.",
        axes=("layer", "norm"),
        series_of=layers_of(lambda matrix: matrix.frobenius_norm),
        dashed=layers_of(lambda matrix: matrix.nuclear_norm),
        styles=("Frobenius norm", "nuclear norm"),
        log=True,
    ),
)


def make_chapters(sources: Sequence[Source]) -> dict[str, list[Section]]:
    """Return the chapters of a report by heading, in its order: the sections for which there is something to draw."""
    chapters = {
        "Loss and metrics": [loss_section(sources), metrics_section(sources)],
        "Products in training": [make_section(sources, quantity) for quantity in IN_TRAINING],
        "Matrices of the model": [make_section(sources, quantity) for quantity in OF_THE_MODEL],
        "Interpolation": [interpolation_section(sources)],
    }
    drawn = {heading: [section for section in sections if section.panels] for heading, sections in chapters.items()}
    return {heading: sections for heading, sections in drawn.items() if sections}


def make_section(sources: Sequence[Source], quantity: Quantity) -> Section:
    """Return the plots of a quantity: for each role the mean over its matrices, in the range of all of them.

    Each source has a colour. Of the second quantity the mean alone is shown, dashed. No more than ``MAX_PANELS``
    roles are.
    """
    solid, dashed = ([series(source) for source in sources] for series in (quantity.series_of, quantity.dashed))
    panels = []
    for role in dict.fromkeys(role for series in solid for role in series):
        lines: list[Line] = []
        for source, colour, first, second in zip(sources, PALETTE, solid, dashed, strict=False):
            names = [" ".join(filter(None, (_name(source, sources), style))) for style in quantity.styles]
            lines += _mean(names[0], first.get(role, {}), colour, banded=True)
            lines += _mean(names[1], second.get(role, {}), colour, dashed=True)
        if lines:
            panels.append(Panel(role, *quantity.axes, lines, quantity.log, quantity.from_zero))
    meaning = quantity.meaning
    if any(line.band for panel in panels for line in panel.lines):
        meaning += " Lines are means over the layers, in their range."
    if len(panels) > MAX_PANELS:
        meaning += f" Shown are the first {MAX_PANELS} of {len(panels)} roles; the tables below have all."
    return Section(quantity.heading, meaning, panels[:MAX_PANELS])


def loss_section(sources: Sequence[Source]) -> Section:
    """Return training and evaluation loss."""
    lines = [
        Line(f"{_name(source, sources)} {kind}".strip(), points, colour, dashed=kind == "evaluation")
        for source, colour in zip(sources, PALETTE, strict=False)
        for kind, points in source.losses.items()
    ]
    panels = [Panel("Loss", "step", "loss", lines)] if lines else []
    return Section("Loss", "Mean over the steps since the last log, and over the evaluation data.", panels)


def metrics_section(sources: Sequence[Source]) -> Section:
    """Return metrics of the evaluation, where it ran more than once."""
    traces = [{k: points for k, points in s.traces.items() if k.startswith("eval_")} for s in sources]
    names = dict.fromkeys(key for trace in traces for key, points in trace.items() if len(points) > 1)
    shown = [name for name in names if name not in _NOT_METRICS and not name.endswith(_NOT_METRICS_ENDS)]
    panels = [_lines(sources, name, "step", traces) for name in shown]
    return Section("Metrics", "On the evaluation data, in training.", panels)


def interpolation_section(sources: Sequence[Source]) -> Section:
    """Return loss and metrics between a dense baseline and low-rank models."""
    figures = [source.interpolation for source in sources]
    panels = [_lines(sources, name, "t", figures) for name in dict.fromkeys(chain(*figures))]
    meaning = (
        "θ = (1 - t) θ<sub>b</sub> + t θ<sub>l</sub>, from a dense baseline θ<sub>b</sub> to the model with its "
        "products multiplied out, θ<sub>l</sub> (K22, Sec. 4.3 and Figs. 2, 4, 5). The lower the barrier between them, "
        "the closer they are."
    )
    return Section("From the baseline to the model", meaning, panels)


def _name(source: Source, sources: Sequence[Source]) -> str:
    """The name of a source where there are several."""
    return source.name if len(sources) > 1 else ""


def _lines(sources: Sequence[Source], name: str, xlabel: str, points: Sequence[Mapping[str, Points]]) -> Panel:
    """A plot with one line for each source that has the figure."""
    title = name.removeprefix("eval_").replace("_", " ")
    found = zip(sources, PALETTE, points, strict=False)
    lines = [Line(_name(s, sources), of_s[name], colour) for s, colour, of_s in found if name in of_s]
    return Panel(title, xlabel, title, lines)


def _mean(
    label: str, matrices: Mapping[str, Points], colour: str, *, banded: bool = False, dashed: bool = False
) -> list[Line]:
    """The mean line of matrices, where all of them have a value: over fewer it would jump where a smaller rank ends."""
    values: dict[float, list[float]] = {}
    for points in matrices.values():
        for x, y in dict(points).items():  # where phases meet, what the next one begins with
            values.setdefault(x, []).append(y)
    shared = sorted((x, ys) for x, ys in values.items() if len(ys) == len(matrices))
    band = [(x, min(ys), max(ys)) for x, ys in shared] if banded and len(matrices) > 1 else []
    return [Line(label, [(x, sum(ys) / len(ys)) for x, ys in shared], colour, dashed, band)] if shared else []
