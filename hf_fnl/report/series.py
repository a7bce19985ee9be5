"""The points that plots show, by the role of a matrix in the model and by its name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import chain

import torch

from hf_fnl.report.inspection import Row, Spectrum, describe
from hf_fnl.report.sources import Points, Source

Series = dict[str, dict[str, Points]]

_SMALLEST = 1e-7  # share of the largest singular value below which there is rounding only


def role_of(name: str) -> tuple[str, int]:
    """What a matrix does, and in which layer: ``("encoder.*.ov", 3)`` for ``encoder.3.ov``, 0 where in none."""
    number = re.search(r"(?<![^.])\d+(?![^.])", name)
    if number is None:
        return name, 0
    return f"{name[: number.start()]}*{name[number.end() :]}", int(number[0])


def by_role(points: dict[str, Points]) -> Series:
    """Group the points of matrices by the role of the matrix; those without points are left out."""
    series: Series = {}
    for name, values in points.items():
        if values:
            series.setdefault(role_of(name)[0], {})[name] = values
    return series


def history_of(figure: str) -> Callable[[Source], Series]:
    """A figure of :func:`~hf_fnl.diagnostics.diagnose` by step, where it is finite."""

    def series(source: Source) -> Series:
        points: dict[str, Points] = {}
        for step, products in source.history:
            for name, figures in products.items():
                if math.isfinite(value := figures.get(figure, math.nan)):
                    points.setdefault(name, []).append((step, value))
        return by_role(points)

    return series


def spectra_of(source: Source) -> Series:
    """Singular values by index, over the largest; of an attention the mean over its heads.

    Matrices with fewer than three are left out.
    """
    return by_role({s.name: _normalized(s) for s in source.spectra if s.values.shape[-1] > 2})


def layers_of(figure: Callable[[Row], float]) -> Callable[[Source], Series]:
    """A figure of matrices by layer, for roles that several layers have: one line each."""

    def series(source: Source) -> Series:
        roles = by_role({s.name: [(role_of(s.name)[1], figure(describe(s)))] for s in source.spectra})
        return {role: {role: list(chain(*rows.values()))} for role, rows in roles.items() if len(rows) > 1}

    return series


def _normalized(spectrum: Spectrum) -> Points:
    largest = spectrum.values[:, :1]
    values = torch.where(largest > 0, spectrum.values / largest, 0).mean(0)
    return [(i, value) for i, value in enumerate(values.tolist(), start=1) if value > _SMALLEST]
