"""The chapters of a report: which quantities they show, with formula and source, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from hf_fnl.models.cards.record import STATE_FILE
from hf_fnl.report.panels import INK, Key, Line, Panel, Quantity, legend_of, make_panels, source_colours
from hf_fnl.report.series import layers_of, mean_and_history_of, spectra_of
from hf_fnl.report.sources import LOSSES, Points, Source
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE

MAX_PANELS = 12
# What else a Trainer and our tasks log of an evaluation: the loss, which has its own plot, speed and counts.
_NOT_METRICS = {
    LOSSES["evaluation"],
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_model_preparation_time",
    "eval_tokens",
    "eval_words",
}


@dataclass(frozen=True)
class Section:
    """A quantity, its plots and their legend."""

    heading: str
    meaning: str
    panels: list[Panel]
    legend: list[Key]


@dataclass(frozen=True)
class Chapter:
    """Sections that need the same files, and which sources lack these."""

    heading: str
    sections: list[Section]
    missing: list[str]


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
        "The steeper a line, the less is lost when its end is cut off.",
        xlabel="index i",
        ylabel="singular value / largest",
        series_of=spectra_of,
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
    """All chapters of a report, in its order."""
    chapters = [
        Chapter(
            "Loss and metrics",
            [loss_section(sources), metrics_section(sources)],
            [f"{s.name} logged no loss: it has no {STATE_FILE}." for s in sources if not s.losses],
        ),
        Chapter(
            "Products in training",
            [make_section(sources, quantity) for quantity in IN_TRAINING],
            [
                f"{s.name} has no {DIAGNOSTICS_FILE}: train with --diagnostics_steps N to have one."
                for s in sources
                if not s.history
            ],
        ),
        Chapter(
            "Matrices of the model",
            [make_section(sources, quantity) for quantity in OF_THE_MODEL],
            [f"{s.name} has no weights: no config.json with *.safetensors." for s in sources if not s.spectra],
        ),
    ]
    interpolation = interpolation_section(sources)
    return [*chapters, Chapter("Interpolation", [interpolation], [])] if interpolation.panels else chapters


def make_section(sources: Sequence[Source], quantity: Quantity) -> Section:
    """The plots of a quantity, of no more than ``MAX_PANELS`` roles."""
    panels = make_panels(sources, quantity)
    meaning = quantity.meaning
    if len(panels) > MAX_PANELS:
        meaning += f" Shown are the first {MAX_PANELS} of {len(panels)} roles; the tables below have all."
    return Section(
        quantity.heading,
        meaning,
        panels[:MAX_PANELS],
        legend_of(sources, panels) + _line_styles(quantity.line_styles),
    )


def loss_section(sources: Sequence[Source]) -> Section:
    """Training and evaluation loss."""
    lines = [
        Line(f"{source.name}, {kind}", points, colour, dashed=kind == "evaluation")
        for source, colour in zip(sources, source_colours(sources), strict=True)
        for kind, points in source.losses.items()
    ]
    panels = [Panel("Loss", "step", "loss", lines, [])] if lines else []
    legend = legend_of(sources, panels) + _line_styles(("training", "evaluation"))
    return Section("Loss", "Mean over the steps since the last log, and over the evaluation data.", panels, legend)


def metrics_section(sources: Sequence[Source]) -> Section:
    """Metrics of the evaluation, where it ran more than once."""
    traces = [{k: points for k, points in s.traces.items() if k.startswith("eval_")} for s in sources]
    names = dict.fromkeys(key for trace in traces for key, points in trace.items() if len(points) > 1)
    panels = [_lines(sources, name, "step", traces) for name in names if name not in _NOT_METRICS]
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


def _line_styles(names: tuple[str, str] | None) -> list[Key]:
    return [] if names is None else [Key(names[0], INK), Key(names[1], INK, dashed=True)]
