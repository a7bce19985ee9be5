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
        num_heads = max(math.prod(part.heads or (1,)) for part in product.parts)
        for head in range(num_heads):
            factors = [_cut(part, parameters[part.name], head, num_heads) for part in product.parts]
            total = total + torch.einsum(_FORMULAS[product.kind == "tensor", len(factors)], *factors).square().sum() / 2
            for part in product.parts:
                _cut(part, rest[part.name], head, num_heads).zero_()
    return total + sum(parameter.square().sum() for parameter in rest.values()) / 2


def decay_gradients(products: Sequence[Product], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``F_p`` of whole parameters, from autograd."""
    names = list(dict.fromkeys(name for product in products for name in product.parameter_names))
    with torch.enable_grad():
        leaves = {name: parameters[name].detach().clone().requires_grad_() for name in names}
        gradients = torch.autograd.grad(half_squared_norms(products, leaves), list(leaves.values()))
    return dict(zip(names, gradients, strict=True))


def _cut(part: Factor, parameter: Tensor, head: int, num_heads: int) -> Tensor:
    """What one query head uses: ``(m, r)``."""
    if part.heads is None:
        return parameter
    start, length = part.section or (0, parameter.shape[part.dim])
    blocks = math.prod(part.heads)
    width = length // blocks
    first = start + head * blocks // num_heads * width
    return parameter[first : first + width].T if part.dim == 0 else parameter[:, first : first + width]
