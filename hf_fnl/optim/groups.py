"""Groups of named parameters, by the decay that they get."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from hf_fnl.products import Factor, Product


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    products: Sequence[Product] = (),
    frobenius_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a model into named groups, as torch's optimizers take them.

    Matrices, and tensors of more dimensions, are decayed; vectors (biases, scales) are not. Factors of products are a
    group of their own, together with what their parameters hold beside them.

    Args:
        model: Unwrapped, so that the names are those of its ``named_parameters``.
        weight_decay: Coefficient for all matrices that are no factor of ``products``.
        products: Products to be decayed as such.
        frobenius_decay: ``weight_decay`` of the group of their factors; ``None`` is that of the other matrices, as
            :class:`~hf_fnl.optim.FLAMBe` expects. :class:`~hf_fnl.decay.FrobeniusDecay` has its own coefficient and
            needs 0 here.

    Returns:
        Groups ``{"params": [(name, parameter), ...], "weight_decay": ...}``, none of them empty.

    Raises:
        ValueError: If a factor of a product is frozen or not in the model.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = dict.fromkeys(name for product in products for name in product.parameter_names)
    for product in products:
        if missing := [name for name in product.parameter_names if name not in trainable]:
            raise ValueError(
                f"product {product.name} cannot be decayed: {', '.join(missing)} is frozen or not in the model; "
                "train all of its factors, or leave it out of products"
            )
    matrices = [name for name, parameter in trainable.items() if parameter.ndim >= 2 and name not in factors]
    vectors = [name for name, parameter in trainable.items() if parameter.ndim < 2 and name not in factors]
    groups = (
        (matrices, weight_decay),
        (vectors, 0.0),
        (list(factors), weight_decay if frobenius_decay is None else frobenius_decay),
    )
    return [
        {"params": [(name, trainable[name]) for name in names], "weight_decay": decay}
        for names, decay in groups
        if names
    ]


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
        for part in product.parts:
            if any(part.overlaps(other) for other in by_parameter[part.name]):
                raise ValueError(f"product {product.name}: its factor {part.name} belongs to more than one product")
            by_parameter[part.name].append(part)
