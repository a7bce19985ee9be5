"""The maths on factors against the same figures of the matrix that they stand for."""

import pytest
import torch

from hf_fnl.math import factors as F
from hf_fnl.math.spectral import spectral_init

# Shapes of the factors; every size is coprime to the others, so that a transposed matrix cannot pass.
CASES = {
    "two": [(5, 3), (7, 3)],
    "deep": [(5, 3), (3, 3), (7, 3)],
    "heads": [(2, 5, 3), (2, 7, 3)],
    "deep-heads": [(2, 5, 3), (2, 3, 3), (2, 7, 3)],
    "overcomplete": [(3, 7), (5, 7)],
    "rank-one": [(5, 1), (7, 1)],
    "shared-right": [(2, 4, 5, 3), (2, 1, 7, 3)],
    "shared-left": [(2, 1, 5, 3), (2, 4, 7, 3)],
    "shared-by-all": [(1, 4, 5, 3), (1, 1, 7, 3)],
    "shared-deep": [(2, 1, 5, 3), (2, 4, 3, 3), (2, 4, 7, 3)],
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def factors(request: pytest.FixtureRequest) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in request.param]


def test_product_multiplies_in_the_order_given(factors):
    M = factors[1] if len(factors) == 3 else torch.eye(factors[0].shape[-1], dtype=torch.float64)
    expected = torch.einsum("...ij,...jk,...lk->...il", factors[0], M, factors[-1])
    torch.testing.assert_close(F.product(*factors), expected)


def test_squared_frobenius_norm_is_that_of_the_product(factors):
    expected = F.product(*factors).square().sum((-2, -1))
    torch.testing.assert_close(F.squared_frobenius_norm(*factors), expected)


def test_squared_frobenius_norm_is_beyond_the_range_of_float16():
    """That of every large matrix is; its gradient is within."""
    factors = [(4 * torch.randn(shape)).half().requires_grad_() for shape in [(50, 3), (70, 3)]]
    squared = F.squared_frobenius_norm(*factors)
    expected = F.product(*(factor.double() for factor in factors)).square().sum()
    torch.testing.assert_close(squared.double(), expected, rtol=1e-3, atol=0)
    (squared / 2).backward()
    torch.testing.assert_close(tuple(factor.grad for factor in factors), F.decay_gradients(*factors))


def test_decay_gradients_are_autograds(factors):
    penalty = F.product(*factors).square().sum() / 2
    torch.testing.assert_close(F.decay_gradients(*factors), torch.autograd.grad(penalty, factors))


def test_gradient_of_the_norm_from_grams_is_twice_the_decay(factors):
    gradients = torch.autograd.grad(F.squared_frobenius_norm(*factors).sum() / 2, factors)
    torch.testing.assert_close(gradients, F.decay_gradients(*factors))


def test_singular_values_are_those_of_the_product(factors):
    values = F.singular_values(*factors)
    expected = torch.linalg.svdvals(F.product(*factors))
    count = min(factors[0].shape[-2], factors[-1].shape[-2], factors[0].shape[-1])
    assert values.shape == (*expected.shape[:-1], count)
    torch.testing.assert_close(values, expected[..., :count])
    torch.testing.assert_close(expected[..., count:], torch.zeros_like(expected[..., count:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_singular_values_of_half_precision_factors_are_taken_in_float32(dtype):
    U, V = torch.randn(5, 3, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    values = F.singular_values(U, V)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, F.singular_values(U.float(), V.float()))


@pytest.mark.parametrize("name", ["two", "heads", "overcomplete", "rank-one", "shared-right", "shared-left"])
def test_half_the_squared_factors_bound_the_nuclear_norm(name):
    U, V = (torch.randn(shape, dtype=torch.float64) for shape in CASES[name])
    assert (F.nuclear_norm_bound(U, V) >= torch.linalg.matrix_norm(F.product(U, V), "nuc")).all()


def test_the_bound_is_tight_at_spectral_initialization():
    U, V = spectral_init(torch.randn(5, 7, dtype=torch.float64), 3)
    torch.testing.assert_close(F.nuclear_norm_bound(U, V), torch.linalg.matrix_norm(U @ V.mT, "nuc"))


@pytest.mark.parametrize("name", ["two", "deep", "heads", "deep-heads", "overcomplete"])
def test_the_bound_is_the_penalty_of_ordinary_decay(name):
    factors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in CASES[name]]
    penalty = F.nuclear_norm_bound(*factors).sum()
    torch.testing.assert_close(torch.autograd.grad(penalty, factors), tuple(p.detach() for p in factors))


def test_non_orthogonality_is_the_rms_cosine_of_column_pairs():
    U, V = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    cosines = [
        [torch.cosine_similarity(p[:, i], p[:, j], dim=0) for i in range(3) for j in range(3) if i != j] for p in (U, V)
    ]
    expected = torch.stack([torch.stack(c).square().mean().sqrt() for c in cosines]).mean()
    torch.testing.assert_close(F.non_orthogonality(U, V), expected)


def test_columns_as_tall_as_a_vocabulary_are_orthogonal():
    """Norms of so many float32 numbers, which torch adds up one by one, would be too small."""
    Q = torch.linalg.qr(torch.randn(2**17, 16, dtype=torch.float64)).Q.float().contiguous()
    assert F.non_orthogonality(Q, Q) < 1e-6


@pytest.mark.parametrize(
    ("U", "expected"),
    [
        pytest.param(torch.eye(5, 3) * torch.tensor([1.0, 2.0, 3.0]), 0.0, id="orthogonal"),
        pytest.param(torch.ones(5, 3) * torch.tensor([1.0, -2.0, 3.0]), 1.0, id="parallel"),
        pytest.param(torch.ones(5, 1), 0.0, id="one-column"),
        pytest.param(torch.zeros(5, 3), 0.0, id="zero"),
    ],
)
def test_non_orthogonality_at_its_ends(U, expected):
    torch.testing.assert_close(F.non_orthogonality(U, U), torch.tensor(expected))


def test_the_product_is_never_formed():
    # W would take eight terabytes.
    U, V = torch.randn(2, 1_000_000, 2, dtype=torch.float64).unbind()
    F.decay_gradients(U, V)
    torch.testing.assert_close(F.squared_frobenius_norm(U, V).sqrt(), F.singular_values(U, V).norm())
