"""Truncated SVDs and the initializations built on them, against ``torch.linalg.svd``."""

import pytest
import torch

from hf_fnl.math.spectral import initial_factors, spectral_init, spectral_init_heads, truncated_svd

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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


def test_full_rank_is_exact():
    weight = torch.randn(5, 7, dtype=torch.float64)
    U, V = spectral_init(weight, 5)
    torch.testing.assert_close(U @ V.mT, weight)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3], ids="rank-{}".format)
def test_heads_are_cut_as_the_svd_of_each_formed_product_cuts_them(rank, dtype):
    left, right = torch.randn(2, 5, 3, dtype=dtype), torch.randn(2, 7, 3, dtype=dtype)
    U, V = spectral_init_heads(left, right, rank)
    assert (U.shape, V.shape) == ((2, 5, rank), (2, 7, rank))
    torch.testing.assert_close(U @ V.mT, best_approximation(left @ right.mT, rank), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(U.mT @ U, V.mT @ V, rtol=1e-4, atol=1e-5)


def test_heads_of_rank_one_and_zero_heads_are_finite():
    left, right = torch.randn(2, 5, 3), torch.randn(2, 7, 3)
    left[0], left[1, :, 1:] = 0, 0
    U, V = spectral_init_heads(left, right, 2)
    torch.testing.assert_close(U @ V.mT, left @ right.mT)


def test_heads_whose_columns_repeat_are_cut_to_what_they_hold():
    left, right = torch.randn(2, 701, 1).expand(2, 701, 24), torch.randn(2, 7, 24)
    U, V = spectral_init_heads(left, right, 5)
    torch.testing.assert_close(U @ V.mT, left @ right.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [2, 3], ids="rank-{}".format)
def test_heads_with_columns_of_very_different_size_keep_the_best_approximation(rank):
    sizes = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    left, right = (torch.randn(2, n, 3, dtype=torch.float64) * sizes for n in (5, 7))
    U, V = (factor.double() for factor in spectral_init_heads(left.float(), right.float(), rank))
    product = left @ right.mT
    best_error = (product - best_approximation(product, rank)).norm()
    assert (U @ V.mT - product).norm() - best_error <= 1e-6 * product.norm()
    torch.testing.assert_close(U.mT @ U, V.mT @ V, rtol=1e-4, atol=1e-7)


def test_spectral_ones_of_heads():
    left, right = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    P, _, Qt = torch.linalg.svd(left @ right.mT, full_matrices=False)
    U, V = spectral_init_heads(left, right, 2, "spectral_ones")
    torch.testing.assert_close(U @ V.mT, P[..., :2] @ Qt[..., :2, :])


@pytest.mark.parametrize("rank", [2, 3], ids=["cut", "full"])
def test_biased_projections_are_cut_as_augmented_factors(rank):
    """``(x Q + b_q)(x K + b_k)^T`` is a product, best approximated through ``[Q; b_q]``, ``[K; b_k]``."""
    x = torch.randn(11, 5, dtype=torch.float64)
    Q, K = torch.randn(2, 2, 5, 3, dtype=torch.float64).unbind()
    b_q, b_k = torch.randn(2, 2, 1, 3, dtype=torch.float64).unbind()
    scores = (x @ Q + b_q) @ (x @ K + b_k).mT

    left, right = spectral_init_heads(torch.cat([Q, b_q], 1), torch.cat([K, b_k], 1), rank)
    cut = (x @ left[:, :-1] + left[:, -1:]) @ (x @ right[:, :-1] + right[:, -1:]).mT

    augmented = torch.cat([x, torch.ones(11, 1, dtype=torch.float64)], 1)
    form = best_approximation(torch.cat([Q, b_q], 1) @ torch.cat([K, b_k], 1).mT, rank)
    torch.testing.assert_close(cut, augmented @ form @ augmented.mT)
    if rank == 3:
        torch.testing.assert_close(cut, scores)


def test_initial_factors_split_the_weight_that_is_drawn():
    draw = torch.nn.init.normal_
    torch.manual_seed(0)
    U, V = initial_factors((5, 7), 3, draw, dtype=torch.float64)
    torch.manual_seed(0)
    expected = spectral_init(draw(torch.empty(5, 7, dtype=torch.float64)), 3)
    assert torch.equal(U, expected[0])
    assert torch.equal(V, expected[1])


def test_default_factors_are_drawn_as_layers_of_their_own():
    shapes = []
    U, V = initial_factors((5, 7), 3, lambda weight: shapes.append(tuple(weight.shape)), method="default")
    assert (U.shape, V.shape) == ((5, 3), (7, 3))
    assert shapes == [(3, 7), (5, 3)]  # (out, in), in the order of the forward pass


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


@pytest.mark.parametrize(
    ("change", "rank", "message"),
    [
        pytest.param(1.0, 0, r"rank must be in \[1, 3\], got 0", id="rank-0"),
        pytest.param(1.0, 4, r"rank must be in \[1, 3\], got 4", id="rank-above"),
        pytest.param(torch.nan, 2, "projections of an attention .* NaN or Inf", id="nan"),
    ],
)
def test_errors_of_heads(change, rank, message):
    with pytest.raises(ValueError, match=message):
        spectral_init_heads(torch.ones(2, 5, 3), torch.ones(2, 7, 3) * change, rank)
