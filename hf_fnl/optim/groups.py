"""Groups of named parameters, by the decay that they get."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_fnl.attention import Factor, Product
from hf_fnl.layers import factorized_layers
from hf_fnl.layers.partitioned import full_shape

FACTOR_DECAYS = ("weight", "crs", "none")


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    products: Sequence[Product] = (),
    frobenius_decay: float | None = None,
    factor_decay: str = "weight",
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into named groups, as torch's optimizers take them.

    Matrices, and tensors of more dimensions, are decayed; vectors (biases, scales) are not. Factors of products are a
    group of their own, together with what their parameters hold beside them, and so are those of other factorized
    layers unless they are decayed as matrices are.

    Args:
        model: Unwrapped, so that the names are those of its ``named_parameters``.
        weight_decay: Coefficient for all matrices that are no factor of ``products``.
        products: Products to be decayed as such.
        frobenius_decay: ``weight_decay`` of the group of their factors; ``None`` is that of the other matrices, as
            :class:`~hf_fnl.optim.FLAMBe` expects. :class:`~hf_fnl.optim.frobenius_decay.FrobeniusDecay` has its own
            coefficient and needs 0 here.
        factor_decay: Decay of the factors of layers that are not in ``products``: ``"weight"`` as for other matrices;
            ``"crs"`` scaled by the compression rate (Gray et al. 2019), the share of the parameters of these layers'
            weights that their factors have; or ``"none"``.
        decay_vectors: Decays vectors as matrices are, as :class:`torch.optim.SGD` over all parameters does.

    Returns:
        Groups, none of them empty, each with ``"params"``, a list of ``(name, parameter)``, and ``"weight_decay"``.

    Raises:
        ValueError: If a factor of a product is frozen or not in the model, ``factor_decay`` is unknown, or there is no
            factor to which it could apply.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = dict.fromkeys(name for product in products for name in product.parameter_names)
    for product in products:
        if missing := [name for name in product.parameter_names if name not in trainable]:
            raise ValueError(
                f"product {product.name} cannot be decayed: {', '.join(missing)} is frozen or not in the model; "
                "train all of its factors, or leave it out of products"
            )
    ordinary = {name: parameter for name, parameter in trainable.items() if name not in factors}
    scale, scaled = _scaled_factors(model, ordinary, factor_decay)
    matrices = [name for name, parameter in ordinary.items() if len(full_shape(parameter)) >= 2 and name not in scaled]
    vectors = [name for name, parameter in ordinary.items() if len(full_shape(parameter)) < 2]
    groups = (
        (matrices, weight_decay),
        (vectors, weight_decay if decay_vectors else 0.0),
        (scaled, scale * weight_decay),
        (list(factors), weight_decay if frobenius_decay is None else frobenius_decay),
    )
    return [
        {"params": [(name, trainable[name]) for name in names], "weight_decay": decay}
        for names, decay in groups
        if names
    ]


def _scaled_factors(model: nn.Module, ordinary: Mapping[str, Tensor], factor_decay: str) -> tuple[float, list[str]]:
    """Return the scale of the decay of factors, and the names of these factors; none where it is not scaled."""
    if factor_decay not in FACTOR_DECAYS:
        raise ValueError(f"factor_decay must be one of {', '.join(FACTOR_DECAYS)}, got {factor_decay!r}")
    if factor_decay == "weight":
        return 1.0, []
    names = {parameter: name for name, parameter in ordinary.items()}
    chosen = [layer for layer in factorized_layers(model) if layer.factors()[0] in names]
    if not chosen:
        raise ValueError(f"factor_decay={factor_decay!r} needs trainable factorized layers without Frobenius decay")
    factors = [factor for layer in chosen for factor in layer.factors()]
    if factor_decay == "none":
        return 0.0, [names[factor] for factor in factors]
    dense = sum(math.prod(layer.dense_shape) for layer in chosen)
    return sum(full_shape(factor).numel() for factor in factors) / dense, [names[factor] for factor in factors]


def by_name(groups: Iterable[dict[str, Any]]) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Every parameter of named groups, and the group that it is in."""
    return {
        name: (parameter, group)
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def check_factors(products: Sequence[Product], groups: list[dict[str, Any]]) -> None:
    """Raise a ``ValueError`` unless every factor of ``products`` is in a trainable parameter of named groups, once."""
    if not products:
        raise ValueError("there are no products to decay; find_products(model) lists those of a model")
    if "param_names" not in groups[0]:
        raise ValueError(
            "factors are found by name and the parameters have none: build the optimizer from parameter_groups(model, "
            'products=...), from model.named_parameters(), or from groups {"params": [(name, parameter), ...]}'
        )
    named = by_name(groups)
    for product in products:
        for name in product.parameter_names:
            if name not in named:
                raise ValueError(f"product {product.name}: its factor {name} is not among the optimizer's parameters")
            if not named[name][0].requires_grad:
                raise ValueError(f"product {product.name}: its factor {name} is frozen")
    by_parameter: dict[str, list[Factor]] = defaultdict(list)
    for product in products:
        for factor in product.places:
            if any(factor.overlaps(other) for other in by_parameter[factor.name]):
                raise ValueError(f"product {product.name}: its factor {factor.name} belongs to more than one product")
            by_parameter[factor.name].append(factor)
