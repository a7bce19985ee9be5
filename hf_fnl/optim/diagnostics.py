"""Figures that show how training treats the products of a model, and counts of its parameters and operations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention import Product
from hf_fnl.layers import (
    Factorized,
    FactorizedEmbedding,
    FactorizedLinear,
    HeadProjection,
    LinearPair,
    factorized_layers,
)
from hf_fnl.layers.partitioned import full_shape
from hf_fnl.math.factors import non_orthogonality, nuclear_norm_bound
from hf_fnl.math.precision import no_autocast

Figures = dict[str, float]


@torch.no_grad()
def diagnose(
    model: nn.Module | Mapping[str, Tensor], products: Iterable[Product], *, learning_rate: float | None = None
) -> dict[str, Figures]:
    r"""Norms, rank and effective step size of every product, from ``(r, r)`` cores of its factors.

    The figures of an attention product are means over its heads. ``W`` of a tensor is its kernel as a matrix
    ``(out, in * kh * kw)``; ``nuclear_norm_bound`` and ``non_orthogonality``, which tell of two factors of a matrix,
    are left out there. With ``s`` the singular values of ``W``:

    - ``frobenius_norm``: ``||W||_F = sqrt(sum s^2)``, what Frobenius decay holds down
    - ``nuclear_norm``: ``||W||_* = sum s``
    - ``nuclear_norm_bound``: ``(||U||_F^2 + ||V||_F^2) / 2 >= ||W||_*``, what ordinary decay holds down (K21, Eq. 2)
    - ``operator_norm``: ``||W||_op = max s``
    - ``effective_rank``: ``||W||_* / ||W||_op`` (K22, Sec. 3.3), 0 for a zero matrix
    - ``effective_step_size``: ``learning_rate / ||W||_F^2`` (K21, Sec. 3.3), infinite for a zero matrix
    - ``non_orthogonality``: root-mean-square cosine between columns of a factor, 0 at spectral initialization

    Everything is computed in float32 or better, and read back from the device once.

    Args:
        model: The model that holds the products, or its parameters by name.
        products: What to look at; see :func:`~hf_fnl.attention.find_products`.
        learning_rate: Adds ``effective_step_size`` where given.

    Returns:
        The figures of each product under its name.

    Raises:
        ValueError: If there are no products, or they have no values here.
    """
    products = list(products)
    if not products:
        raise ValueError("there are no products to diagnose; find_products(model) lists those of a model")
    for product in products:
        if any(factor.is_meta for factor in product.factors(model)):
            raise ValueError(
                f"{product.name} is on the meta device or offloaded by accelerate: there is nothing to measure"
            )
    with no_autocast(products[0].factors(model)[0].device):
        rows = [_figures(product, model, learning_rate) for product in products]
    values = iter(torch.stack([figure for row in rows for figure in row.values()]).tolist())
    return {product.name: {name: next(values) for name in row} for product, row in zip(products, rows, strict=True)}


def _figures(
    product: Product, source: nn.Module | Mapping[str, Tensor], learning_rate: float | None
) -> dict[str, Tensor]:
    try:
        s = product.singular_values(source)
    except torch.linalg.LinAlgError as error:
        raise ValueError(f"{product.name} has no singular values, for its factors hold NaN or Inf") from error
    nuclear_norm, operator_norm = s.sum(-1), s.amax(-1)
    figures = {
        "frobenius_norm": s.norm(dim=-1),
        "nuclear_norm": nuclear_norm,
        "operator_norm": operator_norm,
        "effective_rank": torch.where(operator_norm > 0, nuclear_norm / operator_norm, 0),
    }
    if not product.is_tensor:
        factors = tuple(p.to(torch.promote_types(p.dtype, torch.float32)) for p in product.factors(source))
        figures["nuclear_norm_bound"] = nuclear_norm_bound(*factors)
        figures["non_orthogonality"] = non_orthogonality(*factors)
    if learning_rate is not None:
        figures["effective_step_size"] = torch.where(operator_norm > 0, learning_rate / s.square().sum(-1), torch.inf)
    return {name: figure.mean() for name, figure in figures.items()}


def summarize(figures: Mapping[str, Figures], products: Iterable[Product]) -> Figures:
    """Means of the figures of :func:`diagnose` over products of a kind, under names such as ``ov/frobenius_norm``."""
    collected: dict[str, list[float]] = {}
    for product in products:
        for name, value in figures[product.name].items():
            collected.setdefault(f"{product.kind}/{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in collected.items()}


def parameter_count(model: nn.Module) -> Figures:
    """Count the parameters that a model holds, and would hold without factorized layers and narrow heads.

    Tied parameters count once.

    Returns:
        ``total``, ``trainable``, ``in_products`` (the factors of all factorized layers), ``dense_equivalent`` (the same
        model with the dense layer in the place of each that holds factors or narrow heads) and ``ratio``, the share of
        all parameters that are left: ``total / dense_equivalent``.
    """
    parameters = list(model.parameters())
    total = sum(map(_numel, parameters))
    in_products = sum(_factor_count(layer) for layer in factorized_layers(model))
    dense = total + sum(before - after for after, before in map(layer_count, cut_layers(model)))
    return {
        "total": total,
        "trainable": sum(_numel(p) for p in parameters if p.requires_grad),
        "in_products": in_products,
        "dense_equivalent": dense,
        "ratio": total / max(dense, 1),
    }


def cut_layers(model: nn.Module) -> list[nn.Module]:
    """List the layers that hold factors or narrow heads; layers that share factors count once."""
    others = (module for module in model.modules() if isinstance(module, HeadProjection | LinearPair))
    return [*factorized_layers(model), *others]


def layer_count(layer: nn.Module) -> tuple[int, int]:
    """Return how many parameters a layer of :func:`cut_layers` holds, and how many the dense one would.

    Biases count where heads are narrow, which cuts those of queries, keys and values.
    """
    if isinstance(layer, HeadProjection):
        held = _numel(layer.weight)
        if layer.bias is not None and not layer.is_output:
            held += _numel(layer.bias)
        width = sum(count * rank for count, rank in layer.heads)
        return held, held // width * sum(count for count, _ in layer.heads) * layer.dense_width
    if isinstance(layer, LinearPair):
        return layer.rank * (layer.in_features + layer.out_features), layer.in_features * layer.out_features
    assert isinstance(layer, Factorized)
    return _factor_count(layer), _dense_count(layer)


def forward_flops(model: nn.Module) -> Figures:
    """Floating-point operations of the linear layers for a token, counted from their sizes.

    ``2 * parameters`` for each linear layer and each of its factors, a multiplication and an addition per
    entry; a factorized embedding multiplies by ``V`` only, for ``U`` is looked up. Every layer counts as if it saw all
    tokens. Convolutions, attention scores, normalizations and biases are not counted.

    Returns:
        ``factorized`` for the model as it is, ``dense_equivalent`` with every product of a layer multiplied out and
        heads as wide as they were, and ``ratio`` of the first to the second.
    """
    ours = dense = 0
    for module in model.modules():
        if isinstance(module, FactorizedEmbedding):
            ours += _numel(module.V)
        elif isinstance(module, FactorizedLinear):
            ours += _factor_count(module)
            dense += _dense_count(module)
        elif isinstance(module, LinearPair):  # its halves are layers by themselves
            dense += math.prod(module.dense_shape) - layer_count(module)[0]
        elif isinstance(module, nn.Linear | Conv1D):
            ours += _numel(module.weight)
            dense += math.prod(module.dense_shape) if isinstance(module, HeadProjection) else _numel(module.weight)
    return {"factorized": 2 * ours, "dense_equivalent": 2 * dense, "ratio": ours / max(dense, 1)}


def _numel(parameter: Tensor) -> int:
    return full_shape(parameter).numel()


def _factor_count(layer: Factorized) -> int:
    return sum(map(_numel, layer.factors()))


def _dense_count(layer: Factorized) -> int:
    return math.prod(layer.dense_shape)
