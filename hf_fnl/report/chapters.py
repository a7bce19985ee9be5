"""The chapters of a report: which quantities they show, with formula and source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from hf_fnl.report.panels import INK, Key, Line, Panel, Quantity, legend_of, make_panels, source_colours
from hf_fnl.report.series import gaussian_spectra_of, layers_of, mean_and_history_of, spectra_of
from hf_fnl.report.sources import Points, Source
from hf_fnl.report.summary import NOT_METRICS

MAX_PANELS = 12


@dataclass(frozen=True)
class Section:
    """A quantity, its plots and their legend."""

    heading: str
    meaning: str
    panels: list[Panel]
    legend: list[Key]


@dataclass(frozen=True)
class Chapter:
    """Sections that belong together."""

    heading: str
    sections: list[Section]


IN_TRAINING = (
    Quantity(
        heading="Nuclear norm and its bound",
        meaning="‖W‖<sub>*</sub> = Σσ ≤ ½(‖U‖<sub>F</sub>² + ‖V‖<sub>F</sub>²) for W = UVᵀ (K21, Eq. 2 and Fig. 1). "
        "Ordinary weight decay of the factors holds down the bound; where the two lines meet, it penalizes the nuclear "
        "norm.",
        xlabel="step",
        ylabel="norm",
        series_of=mean_and_history_of("nuclear_norm"),
        dashed=mean_and_history_of("nuclear_norm_bound"),
        line_styles=("nuclear norm", "bound"),
    ),
    Quantity(
        heading="Frobenius norm",
        meaning="‖W‖<sub>F</sub> = √Σσ², which Frobenius decay holds down (K21, Def. 3.2).",
        xlabel="step",
        ylabel="Frobenius norm",
        series_of=mean_and_history_of("frobenius_norm"),
    ),
    Quantity(
        heading="Effective rank",
        meaning="‖W‖<sub>*</sub> / ‖W‖<sub>op</sub> (K22, Sec. 3.3). It falls when the largest singular value outgrows "
        "the others.",
        xlabel="step",
        ylabel="effective rank",
        series_of=mean_and_history_of("effective_rank"),
    ),
    Quantity(
        heading="Effective step size",
        meaning="η / ‖W‖<sub>F</sub>², η the learning rate (K21, Sec. 3.3): how far a step turns a matrix whose scale "
        "does not matter.",
        xlabel="step",
        ylabel="effective step size",
        series_of=mean_and_history_of("effective_step_size"),
    ),
)
OF_THE_MODEL = (
    Quantity(
        heading="Spectra",
        meaning="Singular values in descending order, divided by the largest; of an attention the mean over its heads. "
        "The steeper a line, the less is lost when its end is cut off. Dashed is a Gaussian matrix of the same shape, "
        "as a dense layer is drawn (Marchenko-Pastur; K22, A.1); what training did is how far a line left it.",
        xlabel="index i",
        ylabel="singular value / largest",
        series_of=spectra_of,
        dashed=gaussian_spectra_of,
        line_styles=("this model", "Gaussian"),
        log=True,
    ),
    Quantity(
        heading="Effective rank by layer",
        meaning="‖W‖<sub>*</sub> / ‖W‖<sub>op</sub> (K22, Sec. 3.3), beside the rank that W can have.",
        xlabel="layer",
        ylabel="rank",
        series_of=layers_of(lambda row: row.effective_rank),
        dashed=layers_of(lambda row: row.rank),
        line_styles=("effective rank", "rank"),
        from_zero=True,
    ),
    Quantity(
        heading="Norms by layer",
        meaning="‖W‖<sub>F</sub> = √Σσ² and ‖W‖<sub>*</sub> = Σσ. The further apart, the more singular "
        "values share the weight.",
        xlabel="layer",
        ylabel="norm",
        series_of=layers_of(lambda row: row.frobenius_norm),
        dashed=layers_of(lambda row: row.nuclear_norm),
        line_styles=("Frobenius norm", "nuclear norm"),
        log=True,
    ),
)


def make_chapters(sources: Sequence[Source]) -> list[Chapter]:
    """The chapters of a report, in its order, with the sections for which there is something to draw."""
    chapters = {
        "Loss and metrics": [loss_section(sources), metrics_section(sources)],
        "Products in training": [make_section(sources, quantity) for quantity in IN_TRAINING],
        "Matrices of the model": [make_section(sources, quantity) for quantity in OF_THE_MODEL],
        "Interpolation": [interpolation_section(sources)],
    }
    drawn = {heading: [section for section in sections if section.panels] for heading, sections in chapters.items()}
    return [Chapter(heading, sections) for heading, sections in drawn.items() if sections]


def make_section(sources: Sequence[Source], quantity: Quantity) -> Section:
    """The plots of a quantity, of no more than ``MAX_PANELS`` roles."""
    panels = make_panels(sources, quantity)
    meaning = quantity.meaning
    if len(panels) > MAX_PANELS:
        meaning += f" Shown are the first {MAX_PANELS} of {len(panels)} roles; the tables below have all."
    panels = panels[:MAX_PANELS]
    return Section(
        quantity.heading, meaning, panels, legend_of(sources, panels) + _line_styles(panels, quantity.line_styles)
    )


def loss_section(sources: Sequence[Source]) -> Section:
    """Training and evaluation loss."""
    lines = [
        Line(f"{source.name}, {kind}", points, colour, dashed=kind == "evaluation")
        for source, colour in zip(sources, source_colours(sources), strict=True)
        for kind, points in source.losses.items()
    ]
    log = _is_flattened([value for line in lines for _, value in line.points])
    panels = [Panel("Loss", "step", "loss", lines, [], log=log, wide=True)] if lines else []
    legend = legend_of(sources, panels) + _line_styles(panels, ("training", "evaluation"))
    return Section("Loss", "Mean over the steps since the last log, and over the evaluation data.", panels, legend)


def _is_flattened(values: Sequence[float]) -> bool:
    """Whether a few outliers would press all other values of a plot into a small part of its height."""
    finite = sorted(value for value in values if math.isfinite(value))
    if len(finite) < 5 or finite[0] <= 0:
        return False
    middle = finite[len(finite) // 20 : -max(len(finite) // 20, 1)]  # nine tenths
    return finite[-1] - finite[0] > 5 * (middle[-1] - middle[0])


def metrics_section(sources: Sequence[Source]) -> Section:
    """Metrics of the evaluation, where it ran more than once."""
    traces = [{k: points for k, points in s.traces.items() if k.startswith("eval_")} for s in sources]
    names = dict.fromkeys(key for trace in traces for key, points in trace.items() if len(points) > 1)
    panels = [_lines(sources, name, "step", traces) for name in names if name not in NOT_METRICS]
    return Section("Metrics", "On the evaluation data, in training.", panels, legend_of(sources, panels))


def interpolation_section(sources: Sequence[Source]) -> Section:
    """Loss and metrics between a dense baseline and low-rank models."""
    figures = [source.interpolation for source in sources]
    panels = [_lines(sources, name, "t", figures) for name in dict.fromkeys(chain(*figures))]
    meaning = (
        "θ = (1 - t) θ<sub>b</sub> + t θ<sub>l</sub>, from a dense baseline θ<sub>b</sub> to the model with its "
        "products multiplied out, θ<sub>l</sub> (K22, Sec. 4.3 and Figs. 2, 4, 5). The lower the barrier between them, "
        "the closer they are."
    )
    return Section("From the baseline to the model", meaning, panels, legend_of(sources, panels))


def _lines(sources: Sequence[Source], name: str, xlabel: str, points: Sequence[Mapping[str, Points]]) -> Panel:
    """A plot with one line for each source that has the figure."""
    title = name.removeprefix("eval_").replace("_", " ")
    lines = [
        Line(source.name, of_source[name], colour)
        for source, colour, of_source in zip(sources, source_colours(sources), points, strict=True)
        if name in of_source
    ]
    return Panel(title, xlabel, title, lines, [])


def _line_styles(panels: Sequence[Panel], names: tuple[str, str] | None) -> list[Key]:
    """What solid and dashed lines are, where there are both."""
    drawn = {line.dashed for panel in panels for line in panel.lines}
    return [Key(names[0], INK), Key(names[1], INK, dashed=True)] if names and len(drawn) > 1 else []
