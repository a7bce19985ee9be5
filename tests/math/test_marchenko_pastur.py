"""The spectrum of a Gaussian matrix, beside sampled ones, fresh layers and what a report draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_fnl import FactorizationConfig, FactorizedConv2d, FactorizedLinear, factorize_
from hf_fnl.math.factors import marchenko_pastur_density, marchenko_pastur_values
from hf_fnl.report.inspection import inspect_model
from hf_fnl.report.sections import gaussian_spectra_of, spectra_of
from hf_fnl.report.sources import Source

SHAPES = [(211, 300), (300, 211), (256, 256), (64, 700), (2, 300)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
DOUBLE = {"dtype": torch.float64}


def grid(shape: tuple[int, int], std: float) -> torch.Tensor:
    """Fine, and finest where the density of a square matrix is: its end at zero is no root."""
    return torch.linspace(0, 1.1 * std * (math.sqrt(shape[0]) + math.sqrt(shape[1])), 400_001, **DOUBLE)


@each_shape
@pytest.mark.parametrize("std", [0.02, 1.0])
def test_the_density_is_one_over_the_spectrum_and_has_the_second_moment_of_the_entries(shape, std):
    """``E ||W||_F^2 = m n std^2`` is the sum of the squares of ``min(m, n)`` singular values."""
    s = grid(shape, std)
    density = marchenko_pastur_density(s, shape, std)
    assert torch.trapezoid(density, s).item() == pytest.approx(1, rel=1e-4)
    assert torch.trapezoid(density * s.square(), s).item() == pytest.approx(max(shape) * std**2, rel=1e-4)


def test_it_is_equation_4_of_the_paper():
    """There of the eigenvalues ``lambda = s^2 / N`` of ``W^T W / N``, with ``M <= N``."""
    N, M, sigma = 50, 30, 0.7
    low, high = (sigma**2 * (1 + sign * math.sqrt(M / N)) ** 2 for sign in (-1, 1))
    eigenvalues = torch.linspace(low, high, 99, **DOUBLE)[1:-1]
    of_eigenvalues = (
        N / (2 * math.pi * sigma**2 * M) * ((high - eigenvalues) * (eigenvalues - low)).sqrt() / eigenvalues
    )
    s = (N * eigenvalues).sqrt()
    for shape in ((M, N), (N, M)):
        assert_close(marchenko_pastur_density(s, shape, sigma), of_eigenvalues * 2 * s / N)


def test_nothing_lies_outside_of_the_spectrum():
    ends = torch.tensor([-3.0, 0.0, 2.0, 14.0, 99.0])  # of a 16 x 81 matrix the spectrum is from 5 to 13
    assert not marchenko_pastur_density(ends, (16, 81)).any()
    values = marchenko_pastur_values((16, 81))
    assert ((values > 5) & (values < 13)).all()
    assert (values.diff() < 0).all()


@each_shape
def test_sampled_matrices_have_that_spectrum(shape):
    """To a few of the fluctuations of an eigenvalue, which are of the order of the distance between two."""
    std = 0.3
    values = torch.linalg.svdvals(std * torch.randn(30, *shape, **DOUBLE))
    expected = marchenko_pastur_values(shape, std)
    largest = std * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    assert_close(values.mean(0), expected, rtol=0, atol=0.03 * largest)
    assert_close(values.square().mean(), expected.square().mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("rank", [40, 120])
def test_a_fresh_layer_keeps_the_upper_part_of_it(rank):
    """Spectral initialization keeps the largest singular values of a matrix that is drawn as a dense layer's."""
    layer = FactorizedLinear(200, 120, rank, bias=False, **DOUBLE)
    layer.set_factors_(layer.fresh_factors(nn.init.kaiming_normal_))
    expected = marchenko_pastur_values((120, 200), math.sqrt(2 / 200))[:rank]
    assert_close(
        torch.linalg.svdvals(layer.composed().detach())[:rank], expected, rtol=0, atol=0.05 * expected[0].item()
    )


def test_ranges_that_are_none_are_refused():
    for shape, std in (((0, 3), 1.0), ((3, 2), 0.0), ((3, 2), math.nan)):
        with pytest.raises(ValueError, match="a Gaussian matrix needs positive sides and a positive std"):
            marchenko_pastur_values(shape, std)
        with pytest.raises(ValueError, match="a Gaussian matrix needs"):
            marchenko_pastur_density(torch.ones(1), shape, std)


def test_a_report_shows_it_beside_the_spectrum_of_a_fresh_model():
    model = nn.Sequential(
        nn.Linear(200, 150), nn.Conv2d(20, 60, 3), FactorizedConv2d(20, 60, 3, 50), nn.Linear(150, 150)
    )
    factorize_(model, FactorizationConfig(rank=90, include=["3"]))
    source = Source("fresh", matrices=inspect_model(model))
    drawn, gaussian = spectra_of(source), gaussian_spectra_of(source)
    assert set(drawn) == set(gaussian)
    for role, matrices in drawn.items():
        for name, points in matrices.items():
            beside = gaussian[role][name]
            assert len(beside) >= len(points)
            for (i, value), (j, expected) in zip(points, beside, strict=False):
                assert i == j
                assert value == pytest.approx(expected, abs=0.07)
