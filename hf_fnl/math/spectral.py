r"""Truncated singular value decompositions and the initializations built on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_fnl.utils.suggest import did_you_mean

DRAWN_METHODS = ("default", "he")  # draw the factors themselves, not a weight to be split
INIT_METHODS = ("spectral", "spectral_ones", *DRAWN_METHODS)

# Largest entry of ``Q^T Q - I`` that passes. Rounding in the Gram matrix turns ``P`` a little, but its columns stay
# orthonormal and ``P diag(S) Q^T = P P^T W`` holds; what is lost, and measured, is the orthogonality of ``Q``.
_ORTHOGONALITY_TOLERANCE = 1e-4

# On a CPU, rows of the blocks that a Gram matrix is not halved below, and columns that are read at once: together they
# stay in the cache.
_GRAM_ROWS, _GRAM_COLUMNS = 96, 3072


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""The ``rank`` leading singular triples of a matrix: ``W ~ P diag(S) Q^T``.

    Computed from the eigenvectors of the smaller Gram matrix, which is several times faster than an SVD: in float32,
    then in float64 where that is too coarse (trained weights are ill-conditioned), then by a full SVD.

    Args:
        weight: Matrix of shape ``(m, n)``; half precision is decomposed in float32.
        rank: Number of triples, ``1 <= rank <= min(m, n)``.

    Returns:
        ``P`` of shape ``(m, rank)``, ``S`` of shape ``(rank,)``, descending up to rounding, and ``Q`` of shape
        ``(n, rank)``, in float32, or in float64 for a float64 ``weight``. On the meta device only the shapes.

    Raises:
        ValueError: If ``rank`` is out of range or ``weight`` is not finite.
    """
    if weight.ndim != 2:
        raise ValueError(f"a weight to be decomposed must be a matrix, got shape {tuple(weight.shape)}")
    check_rank(rank, min(weight.shape))
    if weight.is_meta:
        return weight.new_empty(weight.shape[0], rank), weight.new_empty(rank), weight.new_empty(weight.shape[1], rank)
    return _finite_svd(weight, rank)


def _finite_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated SVDs of a matrix or of each of a stack ``(..., m, n)``, unless one is not finite."""
    if not torch.stack(weight.aminmax()).isfinite().all():
        raise ValueError(f"a weight of shape {tuple(weight.shape[-2:])} to be decomposed holds NaN or Inf")
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if weight.shape[-2] <= weight.shape[-1]:
        return _wide_svd(weight, rank)
    Q, S, P = _wide_svd(weight.mT, rank)
    return P, S, Q


def _wide_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    for dtype in dict.fromkeys((weight.dtype, torch.float64)):
        triples = _gram_svd(weight.to(dtype), rank)
        if triples is not None:
            P, S, Q = triples
            return P.to(weight.dtype), S.to(weight.dtype), Q.to(weight.dtype)
    P, S, Qt = torch.linalg.svd(weight, full_matrices=False)
    return P[..., :rank], S[..., :rank], Qt[..., :rank, :].mT


def _gram_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Truncated SVDs of wide matrices from ``W W^T``, or ``None`` where the rounding error of one would show."""
    gram = _lower_gram(weight)
    if not gram.diagonal(dim1=-2, dim2=-1).isfinite().all():  # squares overflow; ``eigh`` may raise on what they leave
        return None
    P = torch.linalg.eigh(gram).eigenvectors[..., -rank:].flip(-1)
    Q = weight.mT @ P
    overlaps = Q.mT @ Q
    S = overlaps.diagonal(dim1=-2, dim2=-1).sqrt()
    error = overlaps / (S.unsqueeze(-1) * S.unsqueeze(-2)) - torch.eye(rank, dtype=S.dtype, device=S.device)
    return (P, S, Q / S.unsqueeze(-2)) if error.abs().max() < _ORTHOGONALITY_TOLERANCE else None


def _lower_gram(weight: Tensor) -> Tensor:
    """``W W^T`` of a matrix with zeros above its block diagonal, of a stack in full: ``eigh`` reads the lower triangle.

    One product is quickest for a stack, which is on a GPU.
    """
    if weight.ndim > 2:
        return weight @ weight.mT
    gram = weight.new_zeros(len(weight), len(weight))
    for columns in weight.split(_GRAM_COLUMNS, 1):
        _add_lower_gram_(gram, columns)
    return gram


def _add_lower_gram_(gram: Tensor, weight: Tensor) -> None:
    half = len(weight) // 2
    if half < _GRAM_ROWS:
        gram.addmm_(weight, weight.mT)
        return
    upper, lower = weight[:half], weight[half:]
    _add_lower_gram_(gram[:half, :half], upper)
    _add_lower_gram_(gram[half:, half:], lower)
    gram[half:, :half].addmm_(lower, upper.mT)


def spectral_init(weight: Tensor, rank: int, method: str = "spectral") -> tuple[Tensor, Tensor]:
    r"""Split ``weight`` into balanced factors ``U = P sqrt(S)``, ``V = Q sqrt(S)`` of its truncated SVD.

    The product ``U V^T`` is the best approximation of rank ``rank`` (Khodak et al. 2021, Def. 3.1).
    ``"spectral_ones"`` replaces the singular values by ones (Kamalakara et al. 2022, Sec. 4.1).

    Args:
        weight: Dense matrix, shape ``(m, n)``.
        rank: Singular triples kept, ``1 <= rank <= min(m, n)``.
        method: ``"spectral"`` or ``"spectral_ones"``.

    Returns:
        ``U`` of shape ``(m, rank)`` and ``V`` of shape ``(n, rank)``, in the dtype of ``weight``.

    Raises:
        ValueError: If ``rank`` or ``method`` is not allowed, or ``weight`` is not finite.
    """
    return _balanced(truncated_svd(weight, rank), method, weight.dtype)


def spectral_init_stack(weights: Sequence[Tensor], rank: int, method: str = "spectral") -> tuple[Tensor, Tensor]:
    r"""What :func:`spectral_init` makes of matrices of one shape, decomposed together.

    On a GPU the host waits for the device once for all of them. On a CPU it is no quicker than one after the other.

    Args:
        weights: Dense matrices, each of shape ``(m, n)``, on one device.
        rank: Singular triples kept, ``1 <= rank <= min(m, n)``.
        method: ``"spectral"`` or ``"spectral_ones"``.

    Returns:
        ``U`` of shape ``(len(weights), m, rank)`` and ``V`` of shape ``(len(weights), n, rank)``.

    Raises:
        ValueError: If ``rank`` or ``method`` is not allowed, or a weight is not finite.
    """
    check_rank(rank, min(weights[0].shape))
    return _balanced(_finite_svd(torch.stack(list(weights)), rank), method, weights[0].dtype)


def _balanced(triples: tuple[Tensor, Tensor, Tensor], method: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    P, S, Q = triples
    root = _root(S, method).unsqueeze(-2)
    return (P * root).to(dtype).contiguous(), (Q * root).to(dtype).contiguous()


def spectral_init_heads(left: Tensor, right: Tensor, rank: int, method: str = "spectral") -> tuple[Tensor, Tensor]:
    r"""Spectral initialization of every ``left_h right_h^T`` without forming these ``(m, n)`` matrices.

    With ``left^T left = L L^T`` the eigenvectors ``Z`` of ``L^T (right^T right) L`` are the left singular vectors in
    the orthonormal basis ``left L^{-T}``; the roots of its eigenvalues are the singular values. Cutting biased
    projections is the same call on the *augmented* factors ``[Q; b_q]`` and ``[K; b_k]``, for
    ``(x Q + b_q)(x K + b_k)^T`` is their product.

    Args:
        left: Left factors, shape ``(heads, m, d)``.
        right: Right factors, shape ``(heads, n, d)``.
        rank: Singular triples kept per head, ``1 <= rank <= d``.
        method: ``"spectral"`` or ``"spectral_ones"``.

    Returns:
        Balanced factors of shapes ``(heads, m, rank)`` and ``(heads, n, rank)``, in the dtypes given. On the meta
        device only the shapes. What a head has no singular value for is zero.

    Raises:
        ValueError: If ``rank`` or ``method`` is not allowed, or a factor is not finite.
    """
    check_rank(rank, min(*left.shape[-2:], right.shape[-2]))
    if left.is_meta:
        return left[..., :rank].clone(), right[..., :rank].clone()
    # Small ones, which torch gives to a GPU one by one, each for longer than a CPU takes (pytorch/pytorch#174674).
    factors = left.double(), right.double()
    grams = torch.stack([factor.mT @ factor for factor in factors]).cpu()
    if not grams.isfinite().all():
        raise ValueError("the projections of an attention to be decomposed hold NaN or Inf")
    maps = torch.stack(_head_maps(grams[0], grams[1], rank, method)).to(left.device)
    return (factors[0] @ maps[0]).to(left.dtype), (factors[1] @ maps[1]).to(right.dtype)


def _head_maps(left_gram: Tensor, right_gram: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor]:
    """Maps ``(heads, d, rank)`` from the factors of each head to its balanced ones, from the Gram matrices of those."""
    size, eps = left_gram.shape[-1], torch.finfo(left_gram.dtype).eps
    # More than rounding may have taken from the smallest eigenvalue: a singular matrix has a Cholesky factor, too.
    ridge = (size**2 * eps * left_gram.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp(min=eps**2)
    identity = torch.eye(size, dtype=left_gram.dtype, device=left_gram.device)
    L = torch.linalg.cholesky(left_gram + ridge[:, None, None] * identity)
    squares, Z = torch.linalg.eigh(L.mT @ right_gram @ L)
    S = squares[..., -rank:].flip(-1).clamp(min=0).sqrt().unsqueeze(-2)
    Z = Z[..., -rank:].flip(-1)
    root = _root(S, method)
    in_right = L @ Z * torch.where(size * eps * S[..., :1] < S, root / S, 0)
    return torch.linalg.solve_triangular(L.mT, Z * root, upper=True), in_right


def initial_factors(
    shape: tuple[int, int],
    rank: int,
    draw: Callable[[Tensor], object],
    *,
    method: str = "spectral",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Fresh factors of a layer, drawn with the dense layer's own initialization.

    ``"spectral"`` and ``"spectral_ones"`` draw the dense weight and split it. The others draw each factor as a layer
    of its own, ``U`` as the weight of ``Linear(rank, m)`` and ``V^T`` as that of ``Linear(n, rank)``: ``"default"`` as
    ``draw`` draws weights, ``"he"`` by the rule of He et al. 2015, the baseline of Kamalakara et al. 2022.

    A ``draw`` at one small standard deviation ``s``, as that of BERT and GPT-2 at 0.02, makes ``"default"`` products of
    entries at ``s^2 sqrt(rank)``, far below those of a dense weight; ``"he"`` scales each factor by its own fan-in.

    Args:
        shape: Shape ``(m, n)`` of the dense weight.
        rank: Columns of the factors.
        draw: Fills a weight of shape ``(out, in)`` in place.
        method: One of ``INIT_METHODS``.
        dtype: Data type of the factors.
        device: Device on which they are drawn and decomposed.

    Returns:
        ``U`` of shape ``(m, rank)`` and ``V`` of shape ``(n, rank)``.
    """
    check_method(method)
    m, n = shape
    if method in DRAWN_METHODS:
        U, Vt = torch.empty(m, rank, dtype=dtype, device=device), torch.empty(rank, n, dtype=dtype, device=device)
        for factor in (Vt, U):
            draw_factor(factor, draw, method)
        return U, Vt.mT.contiguous()
    weight = torch.empty(m, n, dtype=dtype, device=device)
    draw(weight)
    return spectral_init(weight, rank, method)


def draw_factor(weight: Tensor, draw: Callable[[Tensor], object], method: str) -> None:
    r"""Fill the weight ``(out, in, ...)`` of a factor, as a layer of its own, in place.

    Args:
        weight: What is filled.
        draw: Fills it for ``"default"``.
        method: ``"default"`` or ``"he"``, which draws normally with the variance ``2 / fan_in`` (He et al. 2015).
    """
    if method == "he":
        torch.nn.init.kaiming_normal_(weight)
    else:
        draw(weight)


def check_rank(rank: int, limit: int, option: str = "rank") -> None:
    """Raise a ``ValueError`` unless ``1 <= rank <= limit``; ``option`` is the name that the user knows."""
    if not 1 <= rank <= limit:
        raise ValueError(f"{option} must be in [1, {limit}], got {rank}")


def check_method(method: str) -> None:
    """Raise a ``ValueError`` unless ``method`` is one of ``INIT_METHODS``."""
    if method not in INIT_METHODS:
        hint = did_you_mean(str(method), INIT_METHODS)
        raise ValueError(f"factor_init must be one of {', '.join(INIT_METHODS)}, got {method!r}{hint}")


def check_split_method(method: str) -> None:
    """Raise a ``ValueError`` unless ``method`` is one of ``INIT_METHODS`` that split a weight."""
    check_method(method)
    if method in DRAWN_METHODS:
        raise ValueError(f"factor_init={method!r} draws the factors themselves; there is no weight to split")


def _root(singular_values: Tensor, method: str) -> Tensor:
    check_split_method(method)
    return singular_values.sqrt() if method == "spectral" else torch.ones_like(singular_values)
