"""The gradients of ``||W||_F^2 / 2`` of products whose factors may be divided among processes.

Only the Gram matrix ``(heads, r, r)`` of each factor is summed over processes, nothing that grows with the height of a
factor; beside that, what a boundary between processes cuts is exchanged whole: a row of a factor, or a head.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_fnl.functional import multipliers_from_grams
from hf_fnl.optim.sharding import Collectives, Fragment, Shards
from hf_fnl.optim.units import Units
from hf_fnl.products import Product

_Cuts = dict[tuple[str, int, int], Tensor]  # by name, first element and size: pieces that no process holds whole


class _Term(NamedTuple):
    """``F_p = left p right`` of a factor, one matrix for each head."""

    units: Units
    left: Tensor | None
    right: Tensor


class ProductDecay:
    """``F_p``, the gradient of ``||W||_F^2 / 2``, for all that is held here of parameters with factors of products.

    In the place of what such a parameter holds beside factors is that itself, for it gets ordinary decay.

    Args:
        products: The products; no two of them share an element of a parameter.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = products
        self._boundaries: dict[str, set[int]] = {}  # where ranges of processes end in each parameter
        self._terms: dict[str, list[_Term]] = {}  # of factors of matrices, by parameter
        self._cores: dict[str, Tensor] = {}  # F_p of cores of tensors, whole
        self._cuts: _Cuts = {}
        self._due: set[str] = set()
        self._later: dict[Product, set[str]] = {}  # factors that move in later steps than others of their product

    def take(self, shards: Shards, due: Iterable[Fragment], products: Iterable[Product] | None = None) -> None:
        """Take the products of all parameters in ``due`` as they are, before one of their factors moves.

        An engine may move the factors of a product in different steps. So what was taken for a factor is kept until
        that factor is due, too.

        Args:
            shards: Of the optimizer.
            due: What this step moves.
            products: Those to take; all unless given.
        """
        for name in self._due:  # in the step before, and nobody asked for them
            self._terms.pop(name, None)
            self._cores.pop(name, None)
        self._due = {fragment.name for fragment in due}
        taken = self._not_yet_taken(self._products if products is None else products)
        if not taken:
            return
        fragments, collectives = shards.fragments(), shards.collectives
        if not shards.steps_in_parts:
            self._later.clear()
            self._cuts.clear()
        units = {product: _units(product, fragments) for product in taken}
        each = [unit for units_of_product in units.values() for unit in units_of_product]
        self._cuts |= self._exchange(each, fragments, collectives)
        grams = self._grams(each, fragments, collectives)
        for product, units_of_product in units.items():
            if product.is_tensor:
                self._take_cores(product, units_of_product)
            else:
                self._take_factors(units_of_product, grams)

    def term(self, fragment: Fragment, buffer: Tensor | None = None) -> Tensor:
        """``F_p`` of a fragment of which a product was taken; the fragment's own tensor otherwise.

        Args:
            fragment: What is about to move.
            buffer: Contiguous, in the shape of ``fragment.local``; it may be overwritten with the result.

        Returns:
            In the shape of ``fragment.local``.
        """
        if fragment.name in self._cores:
            core = self._cores.pop(fragment.name).reshape(-1)
            return _cut_out(core, fragment.start, fragment.stop).view(fragment.local.shape)
        if fragment.name not in self._terms:
            return fragment.local
        terms, data = self._terms.pop(fragment.name), fragment.data
        if sum(term.units.numel for term in terms) < math.prod(fragment.shape):
            buffer = fragment.local.clone() if buffer is None else buffer.copy_(fragment.local)
        elif buffer is None:
            buffer = torch.empty_like(fragment.local)
        buffer = buffer.contiguous()
        result = buffer.view(-1)
        for term in terms:
            _fill_whole(result, data, fragment, term)
        self._fill_cut(result, fragment, terms)
        return buffer

    def _not_yet_taken(self, products: Iterable[Product]) -> list[Product]:
        """Products with factors that are due, except those that were taken when another factor of theirs was."""
        taken = []
        for product in products:
            due = self._due.intersection(product.parameter_names)
            if due and not due <= self._later.get(product, set()):
                taken.append(product)
                self._later[product] = set(product.parameter_names)
            if due:
                self._later[product] -= due
        return taken

    def _exchange(
        self, units: Sequence[Units], fragments: Mapping[str, Fragment], collectives: Collectives | None
    ) -> _Cuts:
        """Whole pieces of what boundaries cut, and of factors that are needed whole."""
        if not self._boundaries:
            self._boundaries = _boundaries(
                {unit.factor.name for unit in self._all_units(fragments)}, fragments, collectives
            )
        keys = {
            (unit.factor.name, unit.begin(number), unit.size): None
            for unit in units
            for number in unit.cut(self._boundaries[unit.factor.name])
        }
        if collectives is None:
            return {key: fragments[key[0]].data for key in keys}
        if not keys:
            return {}
        first = fragments[units[0].factor.name].local
        message = first.new_zeros(sum(size for _, _, size in keys))
        cuts = dict(zip(keys, message.split([size for _, _, size in keys]), strict=True))
        for (name, begin, size), piece in cuts.items():
            fragment = fragments[name]
            low, high = max(fragment.start, begin), min(fragment.stop, begin + size)
            if low < high and _counts(fragment, collectives):
                here = _cut_out(fragment.data, low - fragment.start, high - fragment.start)
                _cut_out(piece, low - begin, high - begin).copy_(here)
        collectives.sum_(message, "cuts")
        return cuts

    def _all_units(self, fragments: Mapping[str, Fragment]) -> list[Units]:
        return [unit for product in self._products for unit in _units(product, fragments)]

    def _grams(
        self, units: Sequence[Units], fragments: Mapping[str, Fragment], collectives: Collectives | None
    ) -> dict[Units, Tensor]:
        """``p^T p`` of every factor, ``(heads, r, r)``, except those that are needed whole."""
        units = [unit for unit in units if not unit.entire]
        if collectives is None:
            matrices = {unit: unit.matrices(_whole_piece(unit, fragments[unit.factor.name])[1]) for unit in units}
            return {unit: x.mT @ x for unit, x in matrices.items()}
        if not units:
            return {}
        first = fragments[units[0].factor.name].local
        sizes = [unit.num_heads * unit.width**2 for unit in units]
        message = first.new_zeros(sum(sizes), dtype=torch.promote_types(first.dtype, torch.float32))
        grams = {
            unit: part.view(unit.num_heads, unit.width, unit.width)
            for unit, part in zip(units, message.split(sizes), strict=True)
        }
        for unit, gram in grams.items():
            fragment = fragments[unit.factor.name]
            low, piece = _whole_piece(unit, fragment)
            if piece.numel() and _counts(fragment, collectives):
                _add_gram(unit, gram, low, piece)
        collectives.sum_(message, "grams")
        for unit, gram in grams.items():
            for number in unit.cut(self._boundaries[unit.factor.name]):
                _add_gram(unit, gram, number, self._cuts[unit.factor.name, unit.begin(number), unit.size])
        return {unit: gram.to(fragments[unit.factor.name].local.dtype) for unit, gram in grams.items()}

    def _take_factors(self, units: Sequence[Units], grams: Mapping[Units, Tensor]) -> None:
        outer = [grams[unit].view(*(unit.factor.heads or ()), unit.width, unit.width) for unit in (units[0], units[-1])]
        middle = [self._entire(unit) for unit in units[1:-1]]
        for unit, (left, right) in zip(units, multipliers_from_grams(outer[0], *middle, outer[1]), strict=True):
            heads = unit.factor.heads or (1,)
            self._terms.setdefault(unit.factor.name, []).append(
                _Term(unit, left, right.expand(*heads, *right.shape[-2:]).reshape(-1, *right.shape[-2:]))
            )

    def _take_cores(self, product: Product, units: Sequence[Units]) -> None:
        cores = {unit.factor.name: self._entire(unit) for unit in units}
        self._cores |= dict(zip(cores, product.decay_gradients(cores), strict=True))

    def _entire(self, unit: Units) -> Tensor:
        return self._cuts[unit.factor.name, 0, unit.size].view(unit.shape)

    def _fill_cut(self, result: Tensor, fragment: Fragment, terms: Sequence[_Term]) -> None:
        """Write what lies here of pieces that no process holds whole; several factors may lie in one piece."""
        filled: dict[tuple[str, int, int], Tensor] = {}
        for unit, left, right in terms:
            for number in unit.cut(self._boundaries[fragment.name]):
                key = (fragment.name, unit.begin(number), unit.size)
                piece = self._cuts[key]
                product = _times(left, unit.matrices(piece), unit.heads_of(right, number, number + 1))
                unit.matrices(filled.setdefault(key, piece.clone())).copy_(product)
        for (_, begin, size), piece in filled.items():
            low, high = max(fragment.start, begin), min(fragment.stop, begin + size)
            if low < high:
                here = _cut_out(piece, low - begin, high - begin)
                _cut_out(result, low - fragment.start, high - fragment.start).copy_(here)


def _units(product: Product, fragments: Mapping[str, Fragment]) -> tuple[Units, ...]:
    """The units of each factor of a product."""
    last = len(product.parts) - 1
    return tuple(
        Units(part, fragments[part.name].shape, entire=product.is_tensor or 0 < number < last)
        for number, part in enumerate(product.parts)
    )


def _boundaries(
    names: Iterable[str], fragments: Mapping[str, Fragment], collectives: Collectives | None
) -> dict[str, set[int]]:
    """Where in each parameter the range of a process begins or ends."""
    if collectives is None:
        return {name: set() for name in names}
    here = {name: (fragments[name].start, fragments[name].stop) for name in names if fragments[name].group is not None}
    boundaries: dict[str, set[int]] = defaultdict(set)
    for ranges in collectives.gather(here):
        for name, ends in ranges.items():
            boundaries[name] |= set(ends)
    return {name: boundaries[name] for name in names}


def _counts(fragment: Fragment, collectives: Collectives) -> bool:
    """Whether this process's share goes into a sum: of what every process holds, that of the first one alone."""
    return fragment.group is not None or collectives.rank == 0


def _whole_piece(unit: Units, fragment: Fragment) -> tuple[int, Tensor]:
    """The first whole unit of a fragment, and all of them."""
    low, high = unit.whole(fragment.start, fragment.stop)
    if low == high:
        return low, _cut_out(fragment.data, 0, 0)
    return low, _cut_out(fragment.data, unit.begin(low) - fragment.start, unit.begin(high) - fragment.start)


def _add_gram(unit: Units, gram: Tensor, low: int, piece: Tensor) -> None:
    x = unit.matrices(piece)
    unit.heads_of(gram, low, low + piece.numel() // unit.size).add_(x.mT @ x)


def _cut_out(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat.narrow(0, start, stop - start)  # unlike a slice, this asks nothing of the device


def _times(left: Tensor | None, p: Tensor, right: Tensor) -> Tensor:
    return p @ right if left is None else left @ p @ right


def _fill_whole(result: Tensor, data: Tensor, fragment: Fragment, term: _Term) -> None:
    """Write ``F_p`` for the units of a factor that lie whole in a fragment."""
    unit, left, right = term
    low, high = unit.whole(fragment.start, fragment.stop)
    if low < high:
        here = unit.begin(low) - fragment.start, unit.begin(high) - fragment.start
        p, out = (unit.matrices(_cut_out(flat, *here)) for flat in (data, result))
        torch.matmul(p if left is None else left @ p, unit.heads_of(right, low, high), out=out)
