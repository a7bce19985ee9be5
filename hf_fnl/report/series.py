"""The points that plots show, by the role of a matrix in the model and by its name."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import torch

from hf_fnl.attention.selectors import KINDS
from hf_fnl.math.factors import marchenko_pastur_values
from hf_fnl.report.inspection import Row, Spectrum, describe
from hf_fnl.report.sources import Points, Source

Series = dict[str, dict[str, Points]]

Place = tuple[int, ...]

_NUMBER = r"(?<![^.])\d+(?![^.])"
_SMALLEST = 1e-7  # share of the largest singular value below which there is rounding only


def role_of(name: str) -> tuple[str, Place]:
    """What a matrix does, and where it stands: ``("stages.*.*.conv1", (2, 0))`` for ``stages.2.0.conv1``.

    The place of a matrix without a number in its name is empty.
    """
    return re.sub(_NUMBER, "*", name), tuple(map(int, re.findall(_NUMBER, name)))


def by_role(points: dict[str, Points]) -> Series:
    """Group the points of matrices by the role of the matrix; those without points are left out."""
    series: Series = {}
    for name, values in points.items():
        if values:
            series.setdefault(role_of(name)[0], {})[name] = values
    return series


def history_of(figure: str) -> Callable[[Source], Series]:
    """A figure of :func:`~hf_fnl.optim.diagnostics.diagnose` by step, where it is finite."""

    def series(source: Source) -> Series:
        points: dict[str, Points] = {}
        for step, products in source.history:
            for name, figures in products.items():
                if math.isfinite(value := figures.get(figure, math.nan)):
                    points.setdefault(name, []).append((step, value))
        return by_role(points)

    return series


def mean_and_history_of(figure: str) -> Callable[[Source], Series]:
    """As :func:`history_of`, after the means over all products of a kind, which K21 plots; the Trainer logged these."""
    history = history_of(figure)

    def series(source: Source) -> Series:
        means = {f"all {kind} products": source.traces.get(f"{kind}/{figure}", []) for kind in KINDS}
        finite = {name: [(step, y) for step, y in points if math.isfinite(y)] for name, points in means.items()}
        return by_role(finite) | history(source)

    return series


def spectra_of(source: Source) -> Series:
    """Singular values by index, over the largest; of an attention the mean over its heads.

    Matrices with fewer than three are left out.
    """
    return by_role({s.name: _normalized(s) for s in source.spectra if s.values.shape[-1] > 2})


def gaussian_spectra_of(source: Source) -> Series:
    """:func:`spectra_of` of Gaussian matrices of the same shapes, as dense weights are drawn.

    Products of heads are left out: two Gaussian factors make another distribution.
    """
    drawn = [s for s in source.spectra if len(s.values) == 1 and s.values.shape[-1] > 2]
    return by_role({s.name: _gaussian(s.shape, s.values.shape[-1]) for s in drawn})


@functools.cache
def _gaussian(shape: tuple[int, int], count: int) -> Points:
    values = marchenko_pastur_values(shape)[:count]
    return list(enumerate((values / values[0]).tolist(), start=1))


def layers_of(figure: Callable[[Row], float]) -> Callable[[Source], Series]:
    """A figure of matrices by their order from input to output, for roles that several have: one line each."""

    def series(source: Source) -> Series:
        roles: dict[str, list[tuple[Place, float]]] = {}
        for spectrum in source.spectra:
            role, place = role_of(spectrum.name)
            roles.setdefault(role, []).append((place, figure(describe(spectrum))))
        series: Series = {}
        for role, rows in roles.items():
            if len(rows) > 1:
                series[role] = {role: list(enumerate(y for _, y in sorted(rows)))}
        return series

    return series


def _normalized(spectrum: Spectrum) -> Points:
    largest = spectrum.values[:, :1]
    values = torch.where(largest > 0, spectrum.values / largest, 0).mean(0)
    return [(i, value) for i, value in enumerate(values.tolist(), start=1) if value > _SMALLEST]
