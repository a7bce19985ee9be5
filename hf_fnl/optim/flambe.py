"""FLAMBe: LAMB that decays products instead of their factors."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fnl.functional import decay_multipliers
from hf_fnl.optim.groups import by_name, check_factors
from hf_fnl.optim.lamb import DecayTerm, Lamb
from hf_fnl.products import Factor, Product


class FLAMBe(Lamb):
    r"""LAMB with Frobenius decay of products (Khodak et al. 2021, Sec. 6).

    In the update of a factor ``p`` of a product ``W``, ``weight_decay * p`` becomes ``weight_decay * F_p``, where
    ``F_p`` is the gradient of ``||W||_F^2 / 2``, summed over the heads that share ``p``; the trust ratio is that of the
    whole parameter. All other parameters, and what a parameter holds beside factors, are updated as by :class:`Lamb`.
    All products are taken as they are before the step.

    Args:
        params: Named parameters, ``model.named_parameters()``, or groups of them; see
            :func:`~hf_fnl.optim.parameter_groups`.
        products: The products to decay, from :func:`~hf_fnl.products.find_products`. Their factors are found by name
            at every step, so that a wrapper may replace the parameters in ``param_groups``.
        lr: Learning rate, a number or a tensor without dimensions.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Coefficient of decay, of products and of all other parameters.
        max_grad_norm: As in :class:`Lamb`.

    Raises:
        ValueError: If the parameters have no names, there is no product, a product is a tensor, a factor is missing,
            frozen or in two products, the factors of a product have different ``weight_decay``, or an option is out of
            range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        products: Sequence[Product],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, max_grad_norm=max_grad_norm)
        self.products = tuple(products)
        _check_matrices(self.products)
        check_factors(self.products, self.param_groups)
        _check_decays(self.products, self.param_groups)

    def _decay_term(self) -> DecayTerm:
        """``F_p`` for the factors of products, from what the products are now."""
        named = by_name(self.param_groups)
        parameters = {name: parameter for name, (parameter, _) in named.items()}
        multipliers = defaultdict(list)
        for product in self.products:
            _, group = named[product.parts[0].name]
            if group["weight_decay"] != 0:
                pairs = zip(product.parts, decay_multipliers(*product.factors(parameters)), strict=True)
                for part, (left, right) in pairs:
                    multipliers[parameters[part.name]].append((part, left, right))
        return functools.partial(_frobenius_term, multipliers)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "products": self.products}


def _frobenius_term(
    multipliers: Mapping[Tensor, list[tuple[Factor, Tensor | None, Tensor]]], parameter: Tensor, buffer: Tensor | None
) -> Tensor:
    if parameter not in multipliers:
        return parameter
    factors = [part.view(parameter) for part, _, _ in multipliers[parameter]]
    if sum(factor.numel() for factor in factors) == parameter.numel():
        term = torch.empty_like(parameter) if buffer is None else buffer
    else:  # the rest gets ordinary decay
        term = parameter.clone() if buffer is None else buffer.copy_(parameter)
    for factor, (part, left, right) in zip(factors, multipliers[parameter], strict=True):
        torch.matmul(factor if left is None else left @ factor, right, out=part.view(term))
    return term


def _check_matrices(products: Sequence[Product]) -> None:
    if tensors := [product.name for product in products if product.is_tensor]:
        raise ValueError(
            f"FLAMBe decays products of matrices, and {', '.join(tensors)} are tensors; "
            "use Lamb or another optimizer with FrobeniusDecay"
        )


def _check_decays(products: Sequence[Product], groups: list[dict[str, Any]]) -> None:
    named = by_name(groups)
    for product in products:
        decays = {name: named[name][1]["weight_decay"] for name in product.parameter_names}
        if len(set(decays.values())) > 1:
            listed = ", ".join(f"{name}: {decay}" for name, decay in decays.items())
            raise ValueError(f"product {product.name}: its factors have different weight_decay ({listed})")
