"""What a trained model is made of: size, cost and spectrum of every matrix, as factors or as it is."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.functional import singular_values
from hf_fnl.layers import Factorized
from hf_fnl.products import Product, find_products

FACTORIZATION_FILE = "factorization.json"
DENSE = "dense"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Spectrum:
    """A matrix of a model and its singular values.

    Args:
        name: Name of the product, or of the layer that holds a plain matrix.
        kind: Kind of the product, or ``"dense"``.
        shape: ``(m, n)`` of the matrix that is multiplied with, of one head for the products of an attention.
        rank: Columns of the factors; ``min(m, n)`` for a plain matrix.
        parameters: Entries of the factors, or of the plain matrix, all heads together.
        flops: Operations a token: two for each entry that is multiplied with, none for what is looked up.
        values: Singular values, descending, ``(heads, k)``; one row for what has no heads.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    flops: int
    values: Tensor


@dataclass(frozen=True)
class Row:
    """What ``hf-fnl inspect`` shows of a matrix. The figures of an attention product are means over its heads.

    Args:
        name: As in :class:`Spectrum`, as are ``kind``, ``shape``, ``rank``, ``parameters`` and ``flops``.
        frobenius_norm: ``||W||_F``.
        nuclear_norm: ``||W||_*``, the sum of the singular values.
        effective_rank: ``||W||_* / ||W||_op`` (Kamalakara et al. 2022, Sec. 3.3), 0 for a zero matrix.
        rank_90: Smallest rank that keeps 90 % of ``||W||_F^2``; one for all heads.
        energy: Share of ``||W||_F^2`` that was kept at factorization, where that was recorded.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    flops: int
    frobenius_norm: float
    nuclear_norm: float
    effective_rank: float
    rank_90: int
    energy: float | None = None


def inspect_model(
    model: nn.Module, *, energies: Mapping[str, float] | None = None, progress: Progress | None = None
) -> list[Row]:
    """Describe every product and every other matrix of a model, in the order of its modules.

    Each weight is counted once: the projections of an attention under their ``qk`` and ``ov`` products, a tied table
    under the first layer that holds it. So the parameters add up, and the operations are those of
    :func:`~hf_fnl.diagnostics.forward_flops` for one token.

    Args:
        model: Any model, factorized or not, with its weights in memory.
        energies: Energy that each product kept, as :func:`read_energies` reads it.
        progress: Called with the number of matrices done and that of all.

    Raises:
        ValueError: If the model holds no matrix or is on the meta device, or a weight is not finite.
    """
    energies = energies or {}
    return [describe(spectrum, energies.get(spectrum.name)) for spectrum in measure_spectra(model, progress)]


def read_energies(folder: str | Path) -> dict[str, float]:
    """Energy kept by product, from the ``factorization.json`` of a model folder; empty where there is none."""
    path = Path(folder) / FACTORIZATION_FILE
    if not path.is_file():
        return {}
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return {layer["name"]: layer["energy"] for layer in layers if layer.get("energy") is not None}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of a factorization: {error!r}") from error


@torch.no_grad()
def measure_spectra(model: nn.Module, progress: Progress | None = None) -> list[Spectrum]:
    """Singular values of every matrix that :func:`inspect_model` describes, from cores and Gram matrices."""
    matrices = list(_matrices(model))
    if not matrices:
        raise ValueError(f"{type(model).__name__} holds no product, linear layer or embedding to inspect")
    spectra = []
    for done, (name, kind, factors, flops) in enumerate(matrices, start=1):
        spectra.append(_spectrum(name, kind, factors, flops))
        if progress is not None:
            progress(done, len(matrices))
    return spectra


def describe(spectrum: Spectrum, energy: float | None = None) -> Row:
    """The figures of a matrix from its singular values."""
    s = spectrum.values
    nuclear_norm, operator_norm = s.sum(-1), s.amax(-1)
    cumulated = s.square().sum(0).cumsum(0)
    return Row(
        name=spectrum.name,
        kind=spectrum.kind,
        shape=spectrum.shape,
        rank=spectrum.rank,
        parameters=spectrum.parameters,
        flops=spectrum.flops,
        frobenius_norm=float(s.norm(dim=-1).mean()),
        nuclear_norm=float(nuclear_norm.mean()),
        effective_rank=float(torch.where(operator_norm > 0, nuclear_norm / operator_norm, 0).mean()),
        rank_90=int((cumulated < 0.9 * cumulated[-1]).sum()) + 1 if cumulated[-1] > 0 else 0,
        energy=energy,
    )


def _matrices(model: nn.Module) -> Iterator[tuple[str, str, tuple[Tensor, ...], int | None]]:
    """Name, kind, factors and operations of every matrix; a plain one is its own only factor."""
    flops: Counter[int] = Counter()
    for module in model.modules():
        if isinstance(module, Factorized):
            flops[id(module.U)] += 2 * sum(
                f.numel() for f in module.factors()[-1 if module.kind == "embedding" else 0 :]
            )
        elif isinstance(module, nn.Linear | Conv1D):
            flops[id(module.weight)] += 2 * module.weight.numel()
    products = _products_by_module(model)
    held = {id(model.get_parameter(name)) for found in products.values() for p in found for name in p.parameter_names}
    for path, module in model.named_modules():
        for product in products.get(path, ()):
            factors = product.factors(model)
            heads = factors[0].ndim == 3
            yield product.name, product.kind, factors, None if heads else flops[id(module.U)]
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) and id(module.weight) not in held:
            held.add(id(module.weight))
            weight = module.weight.mT if isinstance(module, Conv1D) else module.weight
            yield path, DENSE, (weight,), flops[id(module.weight)]


def _products_by_module(model: nn.Module) -> dict[str, list[Product]]:
    try:
        products = find_products(model)
    except ValueError:  # there are none: everything is a plain matrix
        return {}
    paths = {path for path, _ in model.named_modules()}
    found: dict[str, list[Product]] = {}
    for product in products:
        found.setdefault(product.name if product.name in paths else product.name.rpartition(".")[0], []).append(product)
    return found


def _spectrum(name: str, kind: str, factors: tuple[Tensor, ...], flops: int | None) -> Spectrum:
    if any(factor.is_meta for factor in factors):
        raise ValueError(f"{name} is on the meta device: load the weights of the model before it is inspected")
    if not all(torch.stack(factor.aminmax()).isfinite().all() for factor in factors):
        raise ValueError(f"the weights of {name} hold NaN or Inf")
    if len(factors) == 1:
        shape, values = tuple(factors[0].shape), _singular_values(factors[0])
        rank = min(shape)
    else:
        shape, values = (factors[0].shape[-2], factors[-1].shape[-2]), singular_values(*factors)
        rank = factors[0].shape[-1]
    parameters = sum(map(_distinct_entries, factors))
    m, n = shape
    flops = 2 * parameters if flops is None else flops
    return Spectrum(name, kind, (m, n), rank, parameters, flops, torch.atleast_2d(values).double().cpu())


def _singular_values(weight: Tensor) -> Tensor:
    """Of a plain matrix, from its smaller Gram matrix in float64: right to 1e-8 of the largest."""
    weight = weight.double()
    gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1)


def _distinct_entries(factor: Tensor) -> int:
    """Entries in memory: heads may share a key and a value, which then are a view that repeats."""
    return math.prod(size for size, stride in zip(factor.shape, factor.stride(), strict=True) if stride != 0)
