r"""Pure functions of the factors of a product ``W = U V^T`` or ``W = U M V^T``.

Shapes, here and everywhere: ``U`` is ``(..., m, r)``, ``M`` is ``(..., r, r)`` and ``V`` is ``(..., n, r)``; leading
dimensions are a batch (the heads of an attention). A factor that several products of the batch share has a 1 there.
Factors are passed in the order in which they are multiplied.
Nothing here forms ``W`` except :func:`product`: the Gram matrices ``(r, r)`` of the factors hold all that is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(*factors: Tensor) -> Tensor:
    """Multiply the factors: ``U V^T`` or ``U M V^T``, shape ``(..., m, n)``."""
    U, *middle, V = factors
    for M in middle:
        U = U @ M
    return U @ V.mT


def squared_frobenius_norm(*factors: Tensor) -> Tensor:
    """``||W||_F^2 = <U^T U, M V^T V M^T>``, one value for each product of the batch, in float32 or better."""
    U, *middle, V = factors
    gram = V.mT @ V
    for M in middle:
        gram = M @ gram @ M.mT
    wide = torch.promote_types(gram.dtype, torch.float32)  # the square of a norm is soon beyond float16
    return ((U.mT @ U).to(wide) * gram).sum((-2, -1))


def kept_energy(dense: tuple[Tensor, ...], U: Tensor, V: Tensor) -> float:
    """``1 - ||W - U V^T||_F^2 / ||W||_F^2`` over a whole batch, without forming ``U V^T``; 1 for a zero ``W``.

    Args:
        dense: ``W``, or the two factors of it that the heads of a dense attention are.
        U: ``(..., m, r)``.
        V: ``(..., n, r)``.
    """
    U, V, *W = (tensor.double() for tensor in (U, V, *dense))
    inner = ((W[0] @ V) * U).sum() if len(W) == 1 else ((W[0].mT @ U) * (W[1].mT @ V)).sum()
    total = W[0].square().sum() if len(W) == 1 else squared_frobenius_norm(*W).sum()
    return float((2 * inner - squared_frobenius_norm(U, V).sum()) / total) if total > 0 else 1.0


def decay_multipliers(*factors: Tensor) -> tuple[tuple[Tensor | None, Tensor], ...]:
    r"""For each factor ``p`` the ``(..., r, r)`` matrices ``(L, R)`` of its Frobenius-decay gradient ``L p R``.

    ``L`` is ``None`` where it is the identity. Those of a shared factor are summed over the products that share it; a
    middle factor is never shared.
    """
    U, *middle, V = factors
    return multipliers_from_grams(U.mT @ U, *middle, V.mT @ V)


def multipliers_from_grams(*grams: Tensor) -> tuple[tuple[Tensor | None, Tensor], ...]:
    """:func:`decay_multipliers` from the Gram matrices ``U^T U`` and ``V^T V``, between them a middle factor if any."""
    gram_u, *middle, gram_v = grams
    if not middle:
        return (None, _sum_over_shares(gram_v, gram_u)), (None, _sum_over_shares(gram_u, gram_v))
    (M,) = middle
    right_u, right_v = M @ gram_v @ M.mT, M.mT @ gram_u @ M
    return (None, _sum_over_shares(right_u, gram_u)), (gram_u, gram_v), (None, _sum_over_shares(right_v, gram_v))


def _sum_over_shares(matrix: Tensor, gram: Tensor) -> Tensor:
    """``matrix``, summed over the products that share the factor whose Gram matrix is ``gram``."""
    shared = [d for d in range(gram.ndim - 2) if gram.shape[d] == 1 and matrix.shape[d] > 1]
    return matrix.sum(shared, keepdim=True) if shared else matrix


def decay_gradients(*factors: Tensor) -> tuple[Tensor, ...]:
    r"""Gradients of ``||W||_F^2 / 2`` with respect to every factor (Khodak et al. 2021, Def. 3.2), ``O(r^2 (m + n))``.

    For two factors ``F_U = U V^T V`` and ``F_V = V U^T U``; for three, also ``F_M = U^T U M V^T V``.
    """
    pairs = zip(factors, decay_multipliers(*factors), strict=True)
    return tuple(p @ right if left is None else left @ p @ right for p, (left, right) in pairs)


def nuclear_norm_bound(*factors: Tensor) -> Tensor:
    """``(||U||_F^2 + ||V||_F^2) / 2``, which is at least ``||U V^T||_*`` (Khodak et al. 2021, Eq. 2).

    This is what ordinary weight decay on the factors penalizes, except that it counts a shared factor once. With a
    middle factor its square is added, as there; the sum bounds nothing then.
    """
    squares = [p.square().sum((-2, -1)) for p in factors]
    return torch.stack(torch.broadcast_tensors(*squares)).sum(0) / 2


def singular_values(*factors: Tensor) -> Tensor:
    """Singular values of ``W`` that can differ from zero, in descending order, shape ``(..., min(m, n, r))``.

    Taken from the triangular factors of ``U`` and ``V``, in float32 or better.
    """
    U, *middle, V = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in factors)
    left, right = torch.linalg.qr(U, mode="r").R, torch.linalg.qr(V, mode="r").R
    for M in middle:
        left = left @ M
    return torch.linalg.svdvals(left @ right.mT)


def marchenko_pastur_density(values: Tensor, shape: tuple[int, int], std: float = 1.0) -> Tensor:
    r"""Density of the singular values of a Gaussian matrix (Marchenko and Pastur 1967; Kamalakara et al. 2022, A.1).

    With ``M <= N`` the sides of the matrix and ``s_+- = std (sqrt(N) +- sqrt(M))`` the ends of the spectrum,

    ``sqrt((s_+^2 - s^2) (s^2 - s_-^2)) / (pi std^2 M s)``,

    which is Eq. 4 there for the eigenvalues ``s^2 / N``. It is the limit for large matrices, and close for those of a
    network. The entries need not be Gaussian, only independent with mean zero and one variance.

    Args:
        values: Singular values ``s``.
        shape: Sides of the matrix.
        std: Standard deviation of its entries.

    Returns:
        The density at ``values``, 0 outside of the spectrum; its integral is 1.

    Raises:
        ValueError: If a side or ``std`` is not positive.
    """
    M, N = _gaussian_sides(shape, std)
    low, high = (std * (N**0.5 + sign * M**0.5) for sign in (-1, 1))
    squares = values.square()
    root = ((high**2 - squares) * (squares - low**2)).clamp(min=0).sqrt()
    return torch.where((values > 0) & (root > 0), root / (torch.pi * std**2 * M * values), 0)


def marchenko_pastur_values(shape: tuple[int, int], std: float = 1.0) -> Tensor:
    """Singular values that a Gaussian matrix is expected to have: quantiles of :func:`marchenko_pastur_density`.

    Args:
        shape: Sides of the matrix.
        std: Standard deviation of its entries.

    Returns:
        Descending, shape ``(min(shape),)``, in float64; the ``i``-th has a share ``(i - 1/2) / min(shape)`` above it.

    Raises:
        ValueError: If a side or ``std`` is not positive.
    """
    M, N = _gaussian_sides(shape, std)
    # s^2 = std^2 (N + M + 2 sqrt(N M) cos(angle)): the density has roots at its ends, that of the angle is smooth.
    angles = torch.linspace(0, torch.pi, 16 * M + 1024, dtype=torch.float64)
    squares = N + M + 2 * (N * M) ** 0.5 * angles.cos()
    density = 2 * N * angles.sin().square() / (torch.pi * squares.clamp(min=torch.finfo(torch.float64).eps))
    shares = torch.cumulative_trapezoid(density, angles)
    wanted = (torch.arange(M, dtype=torch.float64) + 0.5) / M * shares[-1]
    return std * squares[1:][torch.searchsorted(shares, wanted)].clamp(min=0).sqrt()


def _gaussian_sides(shape: tuple[int, int], std: float) -> tuple[int, int]:
    if min(shape) < 1 or not std > 0:
        raise ValueError(f"a Gaussian matrix needs positive sides and a positive std, got shape {shape} and std {std}")
    return min(shape), max(shape)


def non_orthogonality(*factors: Tensor) -> Tensor:
    """Root-mean-square cosine between distinct columns of a factor, averaged over ``U`` and ``V``.

    Zero right after spectral initialization, whose factors have orthogonal columns; one when all columns are parallel.
    """
    cosines = [_rms_cosine(p) for p in (factors[0], factors[-1])]
    return torch.stack(torch.broadcast_tensors(*cosines)).mean(0)


def _rms_cosine(p: Tensor) -> Tensor:
    rank, gram = p.shape[-1], p.mT @ p  # products add up more exactly than the norms of torch on a CPU
    lengths = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)).clamp(min=torch.finfo(p.dtype).tiny)
    return (cosines.tril(-1).square().sum((-2, -1)) * 2 / max(rank * (rank - 1), 1)).sqrt()
