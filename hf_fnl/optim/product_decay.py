"""The gradients of ``||W||_F^2 / 2`` of products whose factors may be divided among processes.

Only the Gram matrix ``(heads, r, r)`` of each factor is summed over processes, nothing that grows with the height of a
factor. Beside that, the processes that hold parts of one row of a factor, or of one head, show each other these parts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_fnl.attention import Product
from hf_fnl.math.factors import multipliers_from_grams
from hf_fnl.optim.cuts import Piece, Ranges, cut_pieces, make_whole, ranges_of
from hf_fnl.optim.lamb import is_large
from hf_fnl.optim.sharding import Collectives, Fragment, Shards
from hf_fnl.optim.units import Units


class _Term(NamedTuple):
    """``F_p = p right`` of a factor, one matrix ``(r, r)`` for each head."""

    units: Units
    right: Tensor


class ProductDecay:
    """``F_p``, the gradient of ``||W||_F^2 / 2``, for all that is held here of parameters with factors of products.

    In the place of what such a parameter holds beside factors is that itself, for it gets ordinary decay.

    Args:
        products: The products; no two of them share an element of a parameter.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = products
        self._ranges: Ranges = {}
        self._terms: dict[str, list[_Term]] = {}  # by the name of the parameter
        self._entire: dict[str, Tensor] = {}  # F_p of the factors that are taken whole
        self._made_whole: dict[Piece, Tensor] = {}
        self._due: set[str] = set()
        self._later: dict[Product, set[str]] = {}  # factors that move in later steps than others of their product

    def take(self, shards: Shards, due: Sequence[Fragment], products: Iterable[Product] | None = None) -> None:
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
            self._entire.pop(name, None)
        self._due = {fragment.name for fragment in due}
        taken = self._not_yet_taken(self._products if products is None else products)
        if not taken:
            return
        if shards.steps_in_parts:
            fragments = shards.fragments()
        else:
            fragments = {fragment.name: fragment for fragment in due}
            self._later.clear()
            self._made_whole.clear()
        units = {product: _units(product, fragments) for product in taken}
        for product, units_of_product in units.items():
            _check_factors(product, units_of_product, fragments)
        each = [unit for units_of_product in units.values() for unit in units_of_product]
        sums = self._sums(each, fragments, shards.collectives)
        for product, units_of_product in units.items():
            matrices = [sums[unit] for unit in units_of_product]
            if product.is_tensor:
                cores = {unit.factor.name: core for unit, core in zip(units_of_product, matrices, strict=True)}
                self._entire |= dict(zip(cores, product.decay_gradients(cores), strict=True))
            else:
                self._take_factors(units_of_product, matrices)
        if shards.collectives is None:
            self._compute_alike(fragments)

    def writes_term(self, fragment: Fragment) -> bool:
        """Whether :meth:`term` will write into the buffer that it is given."""
        return fragment.name in self._terms

    def term(self, fragment: Fragment, buffer: Tensor | None = None) -> Tensor:
        """``F_p`` of a fragment of which a product was taken; the fragment's own tensor otherwise.

        Args:
            fragment: What is about to move.
            buffer: Contiguous, in the shape of ``fragment.local``; it may be overwritten with the result.

        Returns:
            In the shape of ``fragment.local``.
        """
        if fragment.name in self._entire:
            flat = self._entire.pop(fragment.name).reshape(-1)
            return flat.narrow(0, fragment.start, fragment.stop - fragment.start).view(fragment.local.shape)
        if fragment.name not in self._terms:
            return fragment.local
        terms, data = self._terms.pop(fragment.name), fragment.data
        if sum(term.units.numel for term in terms) < math.prod(fragment.shape):
            buffer = fragment.local.clone() if buffer is None else buffer.copy_(fragment.local)
        elif buffer is None:
            buffer = torch.empty_like(fragment.local)
        buffer = buffer.contiguous()
        for term in terms:
            _fill_whole(buffer.view(-1), data, fragment, term)
        if self._made_whole:
            self._fill_cut(buffer.view(-1), fragment, terms)
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

    def _sums(
        self, units: Sequence[Units], fragments: Mapping[str, Fragment], collectives: Collectives | None
    ) -> dict[Units, Tensor]:
        """``p^T p`` of every factor, ``(*heads, r, r)``, or the factor itself if it is taken whole."""
        if collectives is None:
            return _sums_here(units, fragments)
        pieces = self._make_whole(units, fragments, collectives)
        sizes = [math.prod(unit.sum_shape) for unit in units]
        example = fragments[units[0].factor.name].local
        message = example.new_zeros(sum(sizes), dtype=torch.promote_types(example.dtype, torch.float32))
        sums = dict(zip(units, message.split(sizes), strict=True))
        for unit, total in sums.items():
            fragment = fragments[unit.factor.name]
            if fragment.group is not None or collectives.rank == 0:  # of what every process holds, one share counts
                _add_whole(unit, total, fragment)
                _add_cut(unit, total, {number: self._made_whole[piece] for number, piece in pieces[unit].items()})
        collectives.sum_(message, "grams")
        return {
            unit: total.to(fragments[unit.factor.name].local.dtype).view(unit.sum_shape) for unit, total in sums.items()
        }

    def _make_whole(
        self, units: Sequence[Units], fragments: Mapping[str, Fragment], collectives: Collectives
    ) -> dict[Units, dict[int, Piece]]:
        """Make whole what is held here of cut units; returns those of them that no earlier process holds a part of."""
        if not self._ranges:
            names = {name for product in self._products for name in product.parameter_names}
            self._ranges = ranges_of(sorted(names), fragments, collectives)
        cut = {unit: cut_pieces(unit, self._ranges) for unit in units}
        pieces = dict.fromkeys(piece for numbered in cut.values() for piece in numbered.values())
        self._made_whole |= make_whole(pieces, self._ranges, fragments, collectives)
        firsts = {piece for piece in pieces if piece.holders(self._ranges)[0] == collectives.rank}
        return {
            unit: {number: piece for number, piece in numbered.items() if piece in firsts}
            for unit, numbered in cut.items()
        }

    def _take_factors(self, units: Sequence[Units], matrices: Sequence[Tensor]) -> None:
        """``matrices``: the Gram matrices of the outer factors, and between them a middle factor, if any."""
        for unit, matrix, (left, right) in zip(units, matrices, multipliers_from_grams(*matrices), strict=True):
            if left is not None:
                self._entire[unit.factor.name] = left @ matrix @ right
                continue
            each = right.expand(*(unit.factor.heads or (1,)), *right.shape[-2:]).flatten(0, -3)
            self._terms.setdefault(unit.factor.name, []).append(_Term(unit, each))

    def _compute_alike(self, fragments: Mapping[str, Fragment]) -> None:
        """Compute ``F_p`` of parameters that are one factor each and alike, several in one operation."""
        alone = {name: terms[0] for name, terms in self._terms.items() if len(terms) == 1 and name in fragments}
        filled = {name: term for name, term in alone.items() if term.units.numel == math.prod(term.units.shape)}
        for units in _alike([term.units for term in filled.values()], fragments):
            if len(units) > 1:
                names = [unit.factor.name for unit in units]
                factors = torch.stack([fragments[name].data for name in names])
                results = torch.empty_like(factors)
                rights = torch.stack([self._terms.pop(name)[0].right for name in names])
                torch.matmul(units[0].matrices(factors), rights, out=units[0].matrices(results))
                self._entire |= dict(zip(names, results.unbind(), strict=True))

    def _fill_cut(self, result: Tensor, fragment: Fragment, terms: Sequence[_Term]) -> None:
        """Write what lies here of cut units; several factors may lie in one row."""
        filled: dict[Piece, Tensor] = {}
        for unit, right in terms:
            for number, piece in cut_pieces(unit, self._ranges).items():
                if (whole := self._made_whole.get(piece)) is not None:
                    out = unit.matrices(filled.setdefault(piece, whole.clone()))
                    out.copy_(unit.matrices(whole) @ unit.heads_of(right, number, number + 1))
        for piece, whole in filled.items():
            low, high = piece.overlap(fragment.start, fragment.stop)
            piece.part_of(result, fragment).copy_(whole.narrow(0, low - piece.begin, high - low))


def _units(product: Product, fragments: Mapping[str, Fragment]) -> tuple[Units, ...]:
    """The units of each factor of a product."""
    last = len(product.parts) - 1
    return tuple(
        Units(part, fragments[part.name].shape, entire=product.is_tensor or 0 < number < last)
        for number, part in enumerate(product.parts)
    )


def _check_factors(product: Product, units: Sequence[Units], fragments: Mapping[str, Fragment]) -> None:
    """Raise a ``ValueError`` unless the factors of a product can be multiplied with each other."""
    held = [fragments[unit.factor.name].local for unit in units]
    widths = () if product.is_tensor else {unit.width for unit in units}
    if len({(local.dtype, local.device) for local in held}) > 1 or len(widths) > 1:
        listed = ", ".join(
            f"{unit.factor.name}: {local.dtype} of shape {unit.shape} on {local.device}"
            for unit, local in zip(units, held, strict=True)
        )
        raise ValueError(f"product {product.name}: its factors differ in rank, dtype or device ({listed})")


def _alike(units: Sequence[Units], fragments: Mapping[str, Fragment]) -> list[list[Units]]:
    """Units that lie alike in parameters of one shape, together; but for large ones, whose copies would cost more."""
    together: dict[tuple[Hashable, ...], list[Units]] = {}
    for unit in units:
        local = fragments[unit.factor.name].local
        where = unit.factor.name if is_large(local) else (local.device, local.dtype)
        key = (where, unit.shape, unit.entire, unit.factor.dim, unit.factor.heads, unit.factor.section)
        together.setdefault(key, []).append(unit)
    return list(together.values())


def _sums_here(units: Sequence[Units], fragments: Mapping[str, Fragment]) -> dict[Units, Tensor]:
    """``p^T p`` of every factor that lies here as a whole, of those that are alike in one operation."""
    sums: dict[Units, Tensor] = {}
    for alike in _alike(units, fragments):
        if alike[0].entire:
            sums |= {unit: fragments[unit.factor.name].local for unit in alike}
            continue
        flat = [_whole_units(unit, fragments[unit.factor.name])[1] for unit in alike]
        x = alike[0].matrices(flat[0][None] if len(flat) == 1 else torch.stack(flat))
        sums |= dict(zip(alike, (x.mT @ x).view(len(alike), *alike[0].sum_shape).unbind(), strict=True))
    return sums


def _add_whole(unit: Units, total: Tensor, fragment: Fragment) -> None:
    """Add to a sum what the units that lie whole in a fragment contribute to it."""
    if unit.entire:
        total.narrow(0, fragment.start, fragment.stop - fragment.start).copy_(fragment.data)
        return
    low, flat = _whole_units(unit, fragment)
    if flat.numel():
        _add_gram(unit, total, low, flat)


def _add_cut(unit: Units, total: Tensor, pieces: Mapping[int, Tensor]) -> None:
    for number, flat in pieces.items():
        _add_gram(unit, total, number, flat)


def _add_gram(unit: Units, total: Tensor, low: int, flat: Tensor) -> None:
    x = unit.matrices(flat)
    grams = total.view(unit.num_heads, unit.width, unit.width)
    unit.heads_of(grams, low, low + flat.numel() // unit.size).add_(x.mT @ x)


def _whole_units(unit: Units, fragment: Fragment) -> tuple[int, Tensor]:
    """The number of the first unit that lies whole in a fragment, and all of them, flat."""
    low, high = unit.whole(fragment.start, fragment.stop)
    begin = unit.begin(low) - fragment.start if low < high else 0
    return low, fragment.data.narrow(0, begin, (high - low) * unit.size)


def _fill_whole(result: Tensor, data: Tensor, fragment: Fragment, term: _Term) -> None:
    """Write ``F_p`` for the units of a factor that lie whole in a fragment."""
    unit, right = term
    low, high = unit.whole(fragment.start, fragment.stop)
    if low < high:
        # Unlike a slice, `narrow` asks nothing of the device.
        begin, length = unit.begin(low) - fragment.start, (high - low) * unit.size
        p, out = (unit.matrices(flat.narrow(0, begin, length)) for flat in (data, result))
        torch.matmul(p, unit.heads_of(right, low, high), out=out)
