r"""Pure functions of the cores of a convolution's kernel ``W (out, in, kh, kw)``, held as a tensor decomposition.

- ``"tt"``, a Tensor-Train (Oseledets 2011): ``W[o, i, y, x] = A[o] B[:, y] C[:, x] D[:, i]``, cores ``A (out, r1)``,
  ``B (r1, kh, r2)``, ``C (r2, kw, r3)`` and ``D (r3, in)``;
- ``"tucker"``, a Tucker-2 decomposition (Kim et al. 2016): ``W[o, i, y, x] = A[o] C[:, :, y, x] B[i]``, cores
  ``A (out, r1)``, ``C (r1, r2, kh, kw)`` and ``B (in, r2)``.

Cores are passed in this order; three are Tucker-2, four a Tensor-Train. The ``r`` are the bonds, the shape of a kernel
is ``(out, in, kh, kw)`` everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_fnl.math.precision import no_autocast
from hf_fnl.math.spectral import check_rank, truncated_svd
from hf_fnl.utils.extras import require

TENSOR_SCHEMES = ("tt", "tucker")

Shape = tuple[int, ...]


def largest_bonds(kernel_shape: Shape, scheme: str) -> Shape:
    """The bonds of a decomposition that is exact for every kernel: ``(r1, r2, r3)``, or ``(r1, r2)`` for Tucker-2.

    Raises:
        ValueError: If ``scheme`` is unknown.
    """
    if scheme not in TENSOR_SCHEMES:
        raise ValueError(f"scheme of a tensor must be one of {', '.join(TENSOR_SCHEMES)}, got {scheme!r}")
    m, n, height, width = kernel_shape
    first, last = min(m, n * height * width), min(n, m * height * width)
    return (first, last) if scheme == "tucker" else (first, min(m * height, n * width), last)


def core_shapes(kernel_shape: Shape, rank: int, scheme: str) -> tuple[Shape, ...]:
    """Shapes of the cores whose bonds are ``rank``, or the largest bond where that is less."""
    m, n, height, width = kernel_shape
    first, *middle, last = (min(rank, bond) for bond in largest_bonds(kernel_shape, scheme))
    if not middle:
        return (m, first), (first, last, height, width), (n, last)
    return (m, first), (first, height, *middle), (*middle, width, last), (last, n)


def decompose(kernel: Tensor, rank: int, scheme: str) -> tuple[Tensor, ...]:
    """Split a kernel into cores that all have the same norm.

    By TensorLy, so that results can be compared with those of other work on tensor layers: a Tensor-Train from one
    singular value decomposition after the other, Tucker-2 from alternating ones until the error changes no more.

    Args:
        kernel: Shape ``(out, in, kh, kw)``; half precision is decomposed in float32.
        rank: Largest bond.
        scheme: ``"tt"`` or ``"tucker"``.

    Returns:
        The cores, in the dtype of ``kernel``.

    Raises:
        ImportError: If TensorLy is not installed.
        ValueError: If ``rank`` or ``scheme`` is not allowed, or ``kernel`` is not finite.
    """
    shapes = core_shapes(kernel.shape, rank, scheme)
    check_rank(rank, max(largest_bonds(kernel.shape, scheme)))
    wide = kernel.detach().to(torch.promote_types(kernel.dtype, torch.float32))
    cores = _unbalanced_cores(wide, shapes)
    norms = torch.stack([core.norm() for core in cores])
    scales = norms.log().mean().exp() / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return tuple(
        (core * scale).reshape(shape).to(kernel.dtype) for core, scale, shape in zip(cores, scales, shapes, strict=True)
    )


def _unbalanced_cores(kernel: Tensor, shapes: Sequence[Shape]) -> Sequence[Tensor]:
    tensorly = require("tensorly", "kernels are decomposed into tensors by", "hf_fnl[tensor]")
    from tensorly.decomposition import partial_tucker, tensor_train

    def svd(matrix: Tensor, n_eigenvecs: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
        P, S, Q = truncated_svd(matrix, n_eigenvecs)
        return P, S, Q.mT

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        if len(shapes) == 3:
            # Further iterations cost as much as these and lower the error by less than 1 %, also of a random kernel.
            (core, (left, right)), _ = partial_tucker(kernel, rank=shapes[1][:2], modes=[0, 1], n_iter_max=2, svd=svd)
            return left, core, right
        bonds = [1, *(shape[-1] for shape in shapes[:-1]), 1]
        return tensor_train(kernel.permute(0, 2, 3, 1), rank=bonds, svd=svd).factors


def product(*cores: Tensor) -> Tensor:
    """Multiply the cores: the kernel ``(out, in, kh, kw)``."""
    return _contracted(_train(cores)).permute(0, 3, 1, 2)


def product_cost(*shapes: Shape) -> int:
    """Multiplications that :func:`product` takes for cores of these shapes."""
    if len(shapes) == 3:
        (m, r1), (_, r2, height, width), (n, _) = shapes
        return m * r1 * height * width * r2 + m * height * width * r2 * n
    (m, r1), (_, height, r2), (_, width, r3), (_, n) = shapes
    return m * r1 * height * r2 + m * height * r2 * width * r3 + m * height * width * r3 * n


def squared_frobenius_norm(*cores: Tensor) -> Tensor:
    """``||W||_F^2``, in float32 or better: the square of a norm is soon beyond float16."""
    return product(*(core.to(torch.promote_types(core.dtype, torch.float32)) for core in cores)).square().sum()


def decay_gradients(*cores: Tensor) -> tuple[Tensor, ...]:
    """Gradients of ``||W||_F^2 / 2`` with respect to every core: the tensor analog of Khodak et al. 2021, Def. 3.2."""
    gradients = torch.func.grad(lambda *cores: squared_frobenius_norm(*cores) / 2, tuple(range(len(cores))))
    return gradients(*cores)


def singular_values(*cores: Tensor) -> Tensor:
    """Singular values of ``W`` as a matrix ``(out, in * kh * kw)`` that can differ from zero, in descending order.

    Returns:
        Shape ``(r1,)``, in float32, or in float64 for float64 cores.
    """
    first, *rest = _train([core.to(torch.promote_types(core.dtype, torch.float32)) for core in cores])
    triangle = torch.linalg.qr(first, mode="r").R
    return torch.linalg.svdvals(triangle @ _contracted(rest).flatten(1))


def _contracted(train: Sequence[Tensor]) -> Tensor:
    with no_autocast(train[0].device):  # which casts some of the products and not others
        return functools.reduce(lambda left, right: torch.tensordot(left, right, 1), train)


def _train(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The cores in an order and layout in which each is contracted with the next: ``(out, r1), (r1, ..., r2), ...``."""
    if len(cores) == 3:
        left, core, right = cores
        return left, core.permute(0, 2, 3, 1), right.mT
    return tuple(cores)
