"""Truncated SVDs and the initializations built on them, against ``torch.linalg.svd``."""

import pytest
import torch

from hf_fnl.math.spectral import spectral_init, truncated_svd

SHAPES = {
    "wide": (5, 7, 3),
    "tall": (7, 5, 3),
    "square": (5, 5, 3),
    "full-rank": (5, 7, 5),
    "rank-one": (7, 5, 1),
    "row": (1, 7, 1),
    "several-blocks": (203, 211, 60),
    "several-reads": (5, 3089, 3),
}
# Spectra of trained weights, 60 values each: initial ones are flat.
SPECTRA = {
    "flat": torch.linspace(2, 1, 60),
    "to-1e-9": torch.logspace(0, -9, 60),
    "power-law": torch.arange(1, 61) ** -1.5,
    "one-dominates": torch.cat([torch.tensor([100.0]), torch.linspace(1, 0.5, 59)]),
    "two-levels": torch.cat([torch.ones(30), torch.full((30,), 1e-3)]),
    "rank-deficient": torch.cat([torch.linspace(2, 1, 10), torch.zeros(50)]),
    "zero": torch.zeros(60),
    "tiny": torch.linspace(2, 1, 60) * 1e-25,
    "huge": torch.linspace(2, 1, 60) * 1e25,
}


def matrix(spectrum: torch.Tensor, columns: int = 101) -> torch.Tensor:
    P = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64)).Q
    Q = torch.linalg.qr(torch.randn(columns, len(spectrum), dtype=torch.float64)).Q
    return P * spectrum.double() @ Q.mT


def best_approximation(weight: torch.Tensor, rank: int) -> torch.Tensor:
    P, S, Qt = torch.linalg.svd(weight, full_matrices=False)
    return P[..., :rank] * S[..., None, :rank] @ Qt[..., :rank, :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES.values(), ids=SHAPES.keys())
def test_truncated_svd_is_the_svds_head(m, n, rank, dtype):
    weight = torch.randn(m, n, dtype=dtype)
    P, S, Q = truncated_svd(weight, rank)
    assert (P.shape, S.shape, Q.shape) == ((m, rank), (rank,), (n, rank))
    assert P.dtype == S.dtype == Q.dtype == dtype
    torch.testing.assert_close(S, torch.linalg.svdvals(weight)[:rank], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(P * S @ Q.mT, best_approximation(weight, rank), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("rank", [20, 60])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_ill_conditioned_weights_keep_the_best_approximation(spectrum, rank, tall):
    exact = matrix(spectrum).mT if tall else matrix(spectrum)
    P, S, Q = (t.double() for t in truncated_svd(exact.float(), rank))
    best_error = spectrum[rank:].double().norm()
    assert (P * S @ Q.mT - exact).norm() - best_error <= 1e-5 * exact.norm()
    torch.testing.assert_close(S, spectrum[:rank].double(), rtol=0, atol=float(2e-6 * spectrum[0]))
    for basis in (P, Q):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("spectrum", [SPECTRA["to-1e-9"], SPECTRA["power-law"]], ids=["to-1e-9", "power-law"])
def test_float64_weights_are_decomposed_in_float64(spectrum):
    weight = matrix(spectrum)
    P, S, Q = truncated_svd(weight, 60)
    assert (P * S @ Q.mT - weight).norm() < 1e-12 * weight.norm()


@pytest.mark.parametrize("shape", [(768, 1024), (1024, 768)], ids=["wide", "tall"])
def test_an_initial_weight_needs_no_full_svd(shape, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("the slow path was taken"))
    truncated_svd(torch.randn(shape), 192)


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES.values(), ids=SHAPES.keys())
def test_factors_are_balanced_and_optimal(m, n, rank):
    weight = torch.randn(m, n, dtype=torch.float64)
    singular_values = torch.linalg.svdvals(weight)
    U, V = spectral_init(weight, rank)
    assert (U.shape, V.shape) == ((m, rank), (n, rank))
    torch.testing.assert_close(U.mT @ U, singular_values[:rank].diag())
    torch.testing.assert_close(V.mT @ V, singular_values[:rank].diag())
    torch.testing.assert_close((weight - U @ V.mT).norm(), singular_values[rank:].norm())


def test_spectral_ones_keeps_directions_and_drops_singular_values():
    weight = torch.randn(7, 5, dtype=torch.float64)
    P, _, Qt = torch.linalg.svd(weight, full_matrices=False)
    U, V = spectral_init(weight, 3, "spectral_ones")
    torch.testing.assert_close(U.mT @ U, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(U @ V.mT, P[:, :3] @ Qt[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_decomposed_in_float32(dtype):
    weight = torch.randn(7, 5).to(dtype)
    for half, single in zip(spectral_init(weight, 3), spectral_init(weight.float(), 3), strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half, single.to(dtype))


def test_a_parameter_is_left_as_it_is_and_out_of_the_graph():
    weight = torch.nn.Parameter(torch.randn(7, 5))
    before = weight.detach().clone()
    U, V = spectral_init(weight, 3)
    assert torch.equal(weight, before)
    assert not U.requires_grad
    assert not V.requires_grad
    assert U.is_contiguous()
    assert V.is_contiguous()


def not_finite(value: float) -> torch.Tensor:
    weight = torch.ones(5, 7)
    weight[2, 3] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "rank", "method", "message"),
    [
        pytest.param(torch.ones(5, 7), 0, "spectral", r"rank must be in \[1, 5\], got 0", id="rank-0"),
        pytest.param(torch.ones(5, 7), 6, "spectral", r"rank must be in \[1, 5\], got 6", id="rank-above"),
        pytest.param(not_finite(torch.nan), 3, "spectral", r"shape \(5, 7\) .* NaN or Inf", id="nan"),
        pytest.param(not_finite(torch.inf), 3, "spectral", r"shape \(5, 7\) .* NaN or Inf", id="inf"),
        pytest.param(not_finite(-torch.inf), 3, "spectral", r"shape \(5, 7\) .* NaN or Inf", id="minus-inf"),
        pytest.param(torch.ones(2, 5, 7), 1, "spectral", r"must be a matrix, got shape \(2, 5, 7\)", id="not-a-matrix"),
        pytest.param(
            torch.ones(5, 7), 3, "svd", r"one of spectral, spectral_ones, default, he, got 'svd'", id="method"
        ),
        pytest.param(torch.ones(5, 7), 3, "default", r"there is no weight to split", id="default"),
    ],
)
def test_errors_name_what_is_wrong(weight, rank, method, message):
    with pytest.raises(ValueError, match=message):
        spectral_init(weight, rank, method)
