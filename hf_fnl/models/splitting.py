"""Weights that a model draws on a GPU when it is made, split together where their shapes are equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import initialization as init

from hf_fnl.layers import Factorized, FactorizedLinear
from hf_fnl.math.spectral import DRAWN_METHODS, spectral_init_stack

STACKING_DEVICES = ("cuda",)  # on a CPU matrices of a stack are decomposed one by one, too
PENDING_BYTES = 2**29  # of drawn weights that wait; they are held once more while they are decomposed


@dataclass
class _Pending:
    """Layers with the dense weights drawn for them, by what they have to agree in."""

    groups: dict[tuple[object, ...], list[tuple[FactorizedLinear, Tensor]]] = field(default_factory=dict)
    nbytes: int = 0

    def add(self, layer: FactorizedLinear, weight: Tensor) -> None:
        key = (layer.shape, layer.rank, layer.init, weight.dtype, weight.device)
        self.groups.setdefault(key, []).append((layer, weight))
        self.nbytes += weight.nbytes
        if self.nbytes >= PENDING_BYTES:
            self.split_()

    @torch.no_grad()
    def split_(self) -> None:
        """Set the factors of all that wait, unless a checkpoint has set them."""
        for group in self.groups.values():
            layer, _ = group[0]
            left, right = spectral_init_stack([weight for _, weight in group], layer.rank, layer.init)
            for (layer, _), U, V in zip(group, left, right, strict=True):
                for factor, value in zip(layer.factors(), layer.with_identity(U, V), strict=True):
                    init.copy_(factor, value)
        self.groups, self.nbytes = {}, 0


_PENDING: ContextVar[_Pending | None] = ContextVar("_PENDING", default=None)


@contextmanager
def splitting_together() -> Iterator[None]:
    """Weights given to :func:`split_later` in here are split at the end, or when they take too much memory."""
    if _PENDING.get() is not None:
        yield
        return
    pending = _Pending()
    token = _PENDING.set(pending)
    try:
        yield
    finally:
        _PENDING.reset(token)
    pending.split_()


def split_later(layer: Factorized, draw: Callable[[Tensor], object]) -> bool:
    """Draw the dense weight of a layer now, to split it with others of its shape.

    Args:
        layer: The layer.
        draw: Fills a dense weight in place.

    Returns:
        Whether that was done; if not, nothing was drawn.
    """
    pending = _PENDING.get()
    if pending is None or not isinstance(layer, FactorizedLinear) or layer.init in DRAWN_METHODS:
        return False
    if layer.U.device.type not in STACKING_DEVICES:
        return False
    weight = layer.U.new_empty(layer.shape)
    draw(weight)
    pending.add(layer, weight)
    return True
