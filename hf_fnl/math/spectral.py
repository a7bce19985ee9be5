r"""Truncated singular value decompositions and the initializations built on them."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

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
    """The truncated SVD of a wide matrix from ``W W^T``, or ``None`` where its rounding error would show."""
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
    """``W W^T`` with zeros above its block diagonal: ``eigh`` reads the lower triangle."""
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
    P, S, Q = truncated_svd(weight, rank)
    check_split_method(method)
    if method == "spectral" and not S.is_meta:  # where models are built to be loaded, and shapes are enough
        P, Q = P * S.sqrt(), Q * S.sqrt()
    return P.to(weight.dtype).contiguous(), Q.to(weight.dtype).contiguous()


def draw_factor(weight: Tensor, draw: Callable[[Tensor], object], method: str) -> None:
    """Fill the weight ``(out, in, ...)`` of a factor as that of a layer of its own: by ``draw``, or He's rule."""
    if method == "he":
        torch.nn.init.kaiming_normal_(weight)
    else:
        draw(weight)


def check_rank(rank: int, limit: int, option: str = "rank") -> None:
    """Raise a ``ValueError`` unless ``rank`` is an integer in ``[1, limit]``; the user knows it as ``option``."""
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise ValueError(f"{option} must be an integer, got {rank!r}")
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
