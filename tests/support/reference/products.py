"""Products multiplied out, one head after the other, from pieces cut out of the parameters by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_fnl.attention import Factor, Product

# How factors are multiplied, by whether they are the cores of a tensor and by their number.
_FORMULAS = {
    (False, 2): "mr,nr->mn",
    (False, 3): "mr,rs,ns->mn",
    (True, 3): "oa,abyx,ib->oiyx",
    (True, 4): "oa,ayb,bxc,ci->oiyx",
}


def half_squared_norms(products: Sequence[Product], parameters: Mapping[str, Tensor]) -> Tensor:
    """``sum ||W||_F^2 / 2`` over all heads of all products, and over what their parameters hold beside factors."""
    rest = {name: parameters[name].clone() for product in products for name in product.parameter_names}
    total = torch.zeros((), dtype=torch.float64)
    for product in products:
        num_heads = max(math.prod(factor.heads or (1,)) for factor in product.places)
        for head in range(num_heads):
            factors = [_cut(factor, parameters[factor.name], head, num_heads) for factor in product.places]
            total = total + torch.einsum(_FORMULAS[product.kind == "tensor", len(factors)], *factors).square().sum() / 2
            for factor in product.places:
                _cut(factor, rest[factor.name], head, num_heads).zero_()
    return total + sum(parameter.square().sum() for parameter in rest.values()) / 2


def decay_gradients(products: Sequence[Product], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``F_p`` of whole parameters, from autograd."""
    names = list(dict.fromkeys(name for product in products for name in product.parameter_names))
    with torch.enable_grad():
        leaves = {name: parameters[name].detach().clone().requires_grad_() for name in names}
        gradients = torch.autograd.grad(half_squared_norms(products, leaves), list(leaves.values()))
    return dict(zip(names, gradients, strict=True))


def _cut(factor: Factor, parameter: Tensor, head: int, num_heads: int) -> Tensor:
    """What one query head uses: ``(m, r)``."""
    if factor.heads is None:
        return parameter
    start, length = factor.section or (0, parameter.shape[factor.dim])
    blocks = math.prod(factor.heads)
    width = length // blocks
    first = start + head * blocks // num_heads * width
    return parameter[first : first + width].T if factor.dim == 0 else parameter[:, first : first + width]
