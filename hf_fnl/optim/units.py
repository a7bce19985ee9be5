"""In which pieces a factor lies in its flattened parameter, and which of them a range holds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hf_fnl.attention import Factor


@dataclass(frozen=True)
class Units:
    """The pieces of which a factor in a flattened parameter consists, each needed whole: its rows, or its heads.

    Args:
        factor: The factor.
        shape: Shape of the whole parameter.
        entire: Takes the factor as one piece: the middle factor of a product, and the core of a tensor.
    """

    factor: Factor
    shape: tuple[int, ...]
    entire: bool = False

    @property
    def are_heads(self) -> bool:
        """Whether a head is a block of rows of the parameter."""
        return self.factor.heads is not None and self.factor.dim == 0

    @property
    def section(self) -> tuple[int, int]:
        """First index and length of the factor along the dimension in which its heads lie."""
        return self.factor.section or (0, self.shape[self.factor.dim])

    @property
    def num_heads(self) -> int:
        """Heads of the factor, 1 where there are none."""
        return math.prod(self.factor.heads or (1,))

    @property
    def width(self) -> int:
        """The rank ``r``."""
        return self.section[1] // self.num_heads if self.factor.heads is not None else self.shape[-1]

    @property
    def first(self) -> int:
        """Where the first unit begins in the flattened parameter."""
        return self.section[0] * self.shape[-1] if self.are_heads else 0

    @property
    def size(self) -> int:
        """Elements of a unit."""
        if self.entire:
            return math.prod(self.shape)
        return self.width * self.shape[-1] if self.are_heads else self.shape[-1]

    @property
    def count(self) -> int:
        """Number of units."""
        if self.entire:
            return 1
        return self.num_heads if self.are_heads else math.prod(self.shape[:-1])

    @property
    def sum_shape(self) -> tuple[int, ...]:
        """Shape of what processes add up: the Gram matrix of each head, or the factor itself if it is taken whole."""
        return self.shape if self.entire else (*(self.factor.heads or ()), self.width, self.width)

    def begin(self, unit: int) -> int:
        """Where a unit begins in the flattened parameter."""
        return self.first + unit * self.size

    def whole(self, start: int, stop: int) -> tuple[int, int]:
        """The units that lie in a range of the flattened parameter: the first one, and the one after the last."""
        low = max(0, -((self.first - start) // self.size))
        high = min(self.count, (stop - self.first) // self.size)
        return (0, 0) if self.entire or high <= low else (low, high)

    def cut(self, boundaries: Iterable[int]) -> list[int]:
        """The units that ranges which end at ``boundaries`` cut."""
        if self.entire:
            return []
        inside = (b - self.first for b in boundaries if self.first < b < self.begin(self.count))
        return sorted({b // self.size for b in inside if b % self.size})

    def matrices(self, flat: Tensor) -> Tensor:
        """Some whole units that follow one another, ``(..., elements)``, as ``(..., heads, rows, r)``; a view."""
        batch = flat.shape[:-1]
        if self.are_heads:
            return flat.view(*batch, -1, self.width, self.shape[-1]).mT
        rows = flat.view(*batch, -1, self.shape[-1])
        if self.factor.heads is None:
            return rows.unsqueeze(-3)
        return rows.narrow(-1, *self.section).unflatten(-1, (self.num_heads, -1)).movedim(-2, -3)

    def heads_of(self, matrices: Tensor, low: int, high: int) -> Tensor:
        """Of one matrix for each head, those of the heads that units from ``low`` to ``high`` belong to."""
        return matrices.narrow(0, low, high - low) if self.are_heads else matrices

    @property
    def numel(self) -> int:
        """Elements of the factor; the parameter may hold more."""
        return self.count * (self.size if self.are_heads or self.factor.heads is None else self.section[1])
