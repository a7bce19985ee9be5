"""FLAMBe with every product multiplied out, and its decay taken from autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_fnl.products import Product

from .lamb import ReferenceLamb


class ReferenceFLAMBe(ReferenceLamb):
    """LAMB whose decay term for a factor is the gradient of ``||W||_F^2 / 2``."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], products: Sequence[Product], **options: Any) -> None:
        super().__init__(groups, **options)
        self.products = products

    def decay_terms(self) -> dict[str, Tensor]:
        """The parameters, and in the place of factors the gradients of their products."""
        terms = super().decay_terms()
        for product in self.products:
            with torch.enable_grad():
                factors = {name: self.parameters[name].clone().requires_grad_() for name in product.parameter_names}
                (product.matrix(factors).square().sum() / 2).backward()
            terms.update({name: factor.grad for name, factor in factors.items()})
        return terms
