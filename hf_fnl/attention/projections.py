"""The four projections of an attention, and the products that they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention.products import Factor, Product
from hf_fnl.layers.partitioned import full_shape
from hf_fnl.layers.weight import HoldsFactors


@dataclass(frozen=True)
class Section:
    """A projection that is a part of a parameter: ``length`` indices from ``start`` on, along ``dim``.

    Args:
        weight: The parameter.
        start: First index of the projection's heads.
        length: Heads times their width.
        dim: Dimension along which heads lie: 0 for the outputs of a ``torch.nn.Linear``, 1 for those of a ``Conv1D``.

    Raises:
        ValueError: If the parameter does not reach that far.
    """

    weight: Tensor
    start: int
    length: int
    dim: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.start + self.length <= full_shape(self.weight)[self.dim]:
            raise ValueError(
                f"no section of length {self.length} begins at {self.start} in dimension {self.dim} of a parameter of "
                f"shape {tuple(full_shape(self.weight))}"
            )


Projection: TypeAlias = nn.Linear | Conv1D | HoldsFactors | Section


@dataclass(frozen=True)
class AttentionProjections:
    """The four projections of an attention, each a layer or a :class:`Section` of one.

    Heads lie side by side in all of them, head ``h`` at ``h * width``. Where key and value have fewer heads, each
    serves ``num_heads / num_kv_heads`` query heads that follow one another, as everywhere in Transformers.

    Args:
        query: From inputs to the heads' queries.
        key: From inputs to keys.
        value: From inputs to values.
        output: From the heads' weighted values to the attention's output.
        num_heads: Query heads.

    Raises:
        ValueError: If the sizes do not make up so many heads.
    """

    query: Projection
    key: Projection
    value: Projection
    output: Projection
    num_heads: int

    def __post_init__(self) -> None:
        sizes = {name: size(getattr(self, name), int(name == "output")) for name in _NAMES}
        shared = {_shared_heads(sizes[full], sizes[part], self.num_heads) for full, part in _PAIRS}
        if len(shared) > 1 or None in shared:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"projections of sizes {listed} do not make up {self.num_heads} heads")

    @property
    def num_kv_heads(self) -> int:
        """Heads of key and value."""
        return self.num_heads * size(self.key, 0) // size(self.query, 0)

    def factorized_kinds(self) -> set[str]:
        """Return those of ``"qk"`` and ``"ov"`` with a projection that is itself held as factors."""
        pairs = {"qk": (self.query, self.key), "ov": (self.value, self.output)}
        return {kind for kind, pair in pairs.items() if any(isinstance(side, HoldsFactors) for side in pair)}

    def products(self, path: str, names: Mapping[int, str], part: str | None) -> Iterator[Product]:
        """The ``qk`` and ``ov`` products of a module, given its path, the names of parameters by ``id``, and its part.

        Not those with a projection that is itself factorized.
        """
        group = self.num_heads // self.num_kv_heads
        grouped = group > 1
        full = (self.num_kv_heads, group) if grouped else (self.num_heads,)
        shared = (self.num_kv_heads, 1) if grouped else (self.num_heads,)
        pairs = {
            "qk": ((self.query, 0, full), (self.key, 0, shared)),
            "ov": ((self.value, 0, shared), (self.output, 1, full)),
        }
        for kind, pair in pairs.items():
            if kind not in self.factorized_kinds():
                parts = tuple(_factor(projection, side, heads, names) for projection, side, heads in pair)
                yield Product(f"{path}.{kind}" if path else kind, kind, parts, part)


_NAMES = ("query", "key", "value", "output")
_PAIRS = (("query", "key"), ("output", "value"))


def size(projection: Projection, side: int) -> int:
    """Outputs (``side`` 0) or inputs (1) of a projection."""
    if isinstance(projection, Section):
        return projection.length
    shape = projection.shape if isinstance(projection, HoldsFactors) else full_shape(projection.weight)
    return shape[side ^ isinstance(projection, Conv1D)]


def inputs_of(projection: Projection) -> int:
    """Inputs of a projection from inputs to heads."""
    if isinstance(projection, Section):
        return full_shape(projection.weight)[1 - projection.dim]
    return size(projection, 1)


def _shared_heads(full: int, part: int, num_heads: int) -> int | None:
    """Count the heads as wide as those of ``full`` in ``part``; ``None`` if that does not work out."""
    if num_heads < 1 or full % num_heads or part == 0 or part * num_heads % full:
        return None
    shared = part * num_heads // full
    return None if num_heads % shared else shared


def _factor(projection: Projection, side: int, heads: tuple[int, ...], names: Mapping[int, str]) -> Factor:
    if not isinstance(projection, Section):
        return Factor(names[id(projection.weight)], heads, side ^ isinstance(projection, Conv1D))
    whole = projection.length == full_shape(projection.weight)[projection.dim]
    section = None if whole else (projection.start, projection.length)
    return Factor(names[id(projection.weight)], heads, projection.dim, section)
