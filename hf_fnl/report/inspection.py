"""Size, cost and spectrum of every matrix of a trained model, as factors or as it is."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention import Product, find_products
from hf_fnl.layers import Factorized
from hf_fnl.math.factors import singular_values
from hf_fnl.utils.run_files import FACTORIZATION_FILE, read_json

DENSE = "dense"


@dataclass(frozen=True)
class Matrix:
    """A matrix of a model and its singular values; norms and ranks of an attention product are means over its heads.

    Args:
        name: Name of the product, or of the layer that holds a plain matrix.
        kind: Kind of the product, or ``"dense"``.
        shape: ``(m, n)``, of one head for the products of an attention; a plain or tensorized kernel is ``(out, in *
            height * width)``.
        rank: Columns of the factors; ``min(m, n)`` for a plain matrix.
        parameters: Entries of the factors, or of the plain matrix, all heads together.
        flops: Operations a token, or a position of an image: two for each entry that is multiplied with, none for
            what is looked up.
        singular_values: Descending, ``(heads, k)``; one row for what has no heads.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    flops: int
    singular_values: Tensor

    @property
    def frobenius_norm(self) -> float:
        """``||W||_F``."""
        return float(self.singular_values.norm(dim=-1).mean())

    @property
    def nuclear_norm(self) -> float:
        """``||W||_*``, the sum of the singular values."""
        return float(self.singular_values.sum(-1).mean())

    @property
    def effective_rank(self) -> float:
        """``||W||_* / ||W||_op`` (Kamalakara et al. 2022, Sec. 3.3), 0 for a zero matrix."""
        nuclear_norm, operator_norm = self.singular_values.sum(-1), self.singular_values.amax(-1)
        return float(torch.where(operator_norm > 0, nuclear_norm / operator_norm, 0).mean())

    @property
    def rank_90(self) -> int:
        """Smallest rank that keeps 90 % of ``||W||_F^2``; one for all heads."""
        kept = self.singular_values.square().sum(0).cumsum(0)
        return int((kept < 0.9 * kept[-1]).sum()) + 1 if kept[-1] > 0 else 0

    def figures(self, energy: float | None = None) -> dict[str, Any]:
        """Return all but the singular values by name, with the share of ``||W||_F^2`` kept at factorization."""
        names = ("name", "kind", "shape", "rank", "parameters", "flops", "frobenius_norm", "nuclear_norm")
        return {name: getattr(self, name) for name in (*names, "effective_rank", "rank_90")} | {"energy": energy}


@torch.no_grad()
def inspect_model(model: nn.Module) -> list[Matrix]:
    """Return every product and every other matrix of a model, in the order of its modules.

    Each weight is counted once: the projections of an attention under their ``qk`` and ``ov`` products, a tied table
    under the first layer that holds it. So the parameters add up, and so do the operations: without plain convolutions
    to those of :func:`~hf_fnl.optim.diagnostics.forward_flops`. Singular values come from cores and Gram matrices.

    Args:
        model: Any model, factorized or not, with its weights in memory.

    Raises:
        ValueError: If the model holds no matrix or is on the meta device, or a weight is not finite.
    """
    held = list(_held_matrices(model))
    if not held:
        raise ValueError(f"{type(model).__name__} holds no product, linear layer, convolution or embedding to inspect")
    return [_measured(each) for each in held]


def read_energies(folder: str | Path) -> dict[str, float]:
    """Return the energy that products kept, by name, from the ``factorization.json`` of a model folder, if it has one.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(folder).expanduser() / FACTORIZATION_FILE
    try:
        layers = read_json(path).get("layers", [])
        return {layer["name"]: layer["energy"] for layer in layers if layer.get("energy") is not None}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: a layer lacks its name") from error


class _Held(NamedTuple):
    """A matrix as a model holds it; a plain one is its own only factor.

    The matrix itself is given where singular values are not those of a product of matrices.
    """

    name: str
    kind: str
    factors: tuple[Tensor, ...]
    flops: int
    matrix: Tensor | None = None


def _held_matrices(model: nn.Module) -> Iterator[_Held]:
    attentions = _attention_products(model)
    held = {id(model.get_parameter(name)) for found in attentions.values() for p in found for name in p.parameter_names}
    flops = _flops_by_weight(model)
    for path, module in model.named_modules():
        for product in attentions.get(path, ()):
            factors = product.factors(model)
            yield _Held(product.name, product.kind, factors, 2 * sum(factor.numel() for factor in factors))
        if (first := _first_weight(module)) is None or id(first) in held:
            continue
        held.add(id(first))
        if isinstance(module, Factorized):
            matrix = module.dense_weight().flatten(1) if module.kind == "tensor" else None
            yield _Held(path, module.kind, module.factors(), flops[id(first)], matrix)
        else:
            weight = first.mT if isinstance(module, Conv1D) else first.flatten(1)
            yield _Held(path, DENSE, (weight,), flops[id(first)], weight)


def _flops_by_weight(model: nn.Module) -> Counter[int]:
    """Operations of all layers that multiply with a weight, by its ``id``: a tied table may be looked up as well."""
    flops: Counter[int] = Counter()
    for module in model.modules():
        first = _first_weight(module)
        if first is None or isinstance(module, nn.Embedding):
            continue
        factors = module.factors() if isinstance(module, Factorized) else (first,)
        if isinstance(module, Factorized) and module.kind == "embedding":
            factors = factors[-1:]
        flops[id(first)] += 2 * sum(factor.numel() for factor in factors)
    return flops


def _first_weight(module: nn.Module) -> Tensor | None:
    if isinstance(module, Factorized):
        return module.factors()[0]
    return module.weight if isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.Conv2d) else None


def _attention_products(model: nn.Module) -> dict[str, list[Product]]:
    """The products of attentions, by the name of the attention, but for those of a part of a matrix.

    A matrix of queries, keys and values stays one where not all of them are in products.
    """
    found: dict[str, list[Product]] = {}
    products: list[Product] = []
    with warnings.catch_warnings():
        # An attention of unknown layout is not left out here: its projections are plain matrices.
        warnings.simplefilter("ignore", UserWarning)
        with contextlib.suppress(ValueError):  # there are none
            products = [product for product in find_products(model) if product.kind in ("qk", "ov")]
    covered: Counter[str] = Counter()
    for factor in (factor for product in products for factor in product.places):
        covered[factor.name] += factor.view(model.get_parameter(factor.name)).numel()
    for product in products:
        if all(covered[name] >= model.get_parameter(name).numel() for name in product.parameter_names):
            found.setdefault(product.name.rpartition(".")[0], []).append(product)
    return found


def _measured(held: _Held) -> Matrix:
    name, kind, factors, flops, matrix = held
    if any(factor.is_meta for factor in factors):
        raise ValueError(f"{name} is on the meta device: load the weights of the model before it is inspected")
    if not all(torch.stack(factor.aminmax()).isfinite().all() for factor in factors):
        raise ValueError(f"the weights of {name} hold NaN or Inf")
    rank = factors[0].shape[-1] if len(factors) > 1 else min(factors[0].shape)
    if matrix is None:
        m, n = (factor.shape[-2] for factor in (factors[0], factors[-1]))
        values = singular_values(*factors)
    else:
        (m, n), values = matrix.shape, _singular_values(matrix)
    parameters = sum(factor.numel() for factor in factors)
    return Matrix(name, kind, (m, n), rank, parameters, flops, values.double().cpu().reshape(-1, values.shape[-1]))


def _singular_values(weight: Tensor) -> Tensor:
    """Of a plain matrix, from its smaller Gram matrix in float64: right to 1e-8 of the largest."""
    weight = weight.double()
    gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(-1)
