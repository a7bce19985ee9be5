"""FLAMBe with every product multiplied out, and its decay taken from autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hf_fnl.attention import Product

from .lamb import ReferenceLamb
from .products import decay_gradients


class ReferenceFLAMBe(ReferenceLamb):
    """LAMB whose decay term for a factor is the gradient of ``||W||_F^2 / 2``."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], products: Sequence[Product], **options: Any) -> None:
        super().__init__(groups, **options)
        self.products = products

    def decay_terms(self) -> dict[str, Tensor]:
        """The parameters, and in the place of factors the gradients of their products."""
        return {**super().decay_terms(), **decay_gradients(self.products, self.parameters)}
