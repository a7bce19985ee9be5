"""``F_p``, the gradients of ``||W||_F^2 / 2`` of products, taken before any of their factors moves.

Where parameters are sharded, the processes add up one Gram matrix ``(heads, r, r)`` for each factor, nothing that grows
with its height, and complete the rows and heads that a boundary between them cuts.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_fnl.attention import Factor, Product
from hf_fnl.math.factors import decay_multipliers, multipliers_from_grams
from hf_fnl.optim.sharding import Shards


class Multiplier(NamedTuple):
    """``F_p = left p right`` of a factor ``p``; ``left`` is ``None`` where it is the identity."""

    factor: Factor
    left: Tensor | None
    right: Tensor


@dataclass
class DecayTerms:
    """``F_p`` for the parameters that hold factors of products, as these were when it was made.

    In the place of what such a parameter holds beside factors is that itself, for it gets ordinary decay.
    """

    multipliers: dict[str, list[Multiplier]] = field(default_factory=lambda: defaultdict(list))
    known: dict[str, Tensor] = field(default_factory=dict)  # what was computed already, flat, of the local range

    def __contains__(self, name: str) -> bool:
        return name in self.multipliers or name in self.known

    def write(self, names: Sequence[str], params: Sequence[Tensor], outs: Sequence[Tensor]) -> list[Tensor]:
        """Write ``F_p`` of what holds factors into ``outs``; returns these, and other parameters as they are."""
        terms, beside, written = list(params), [], []
        for i, (name, p, out) in enumerate(zip(names, params, outs, strict=True)):
            if name in self.known:
                terms[i] = self.known[name].view(p.shape)
            elif name in self.multipliers:
                terms[i], multipliers = out, self.multipliers[name]
                if sum(factor.view(p).numel() for factor, _, _ in multipliers) < p.numel():
                    beside.append((out, p))
                for factor, left, right in multipliers:
                    x = factor.view(p) if left is None else left @ factor.view(p)
                    written.append((factor.view(out), x @ right))
        for pairs in (beside, written):
            if pairs:
                torch._foreach_copy_([to for to, _ in pairs], [values for _, values in pairs])
        return terms


def _full_terms(products: Sequence[Product], source: Mapping[str, Tensor]) -> DecayTerms:
    terms = DecayTerms()
    for product in products:
        if product.is_tensor:
            terms.known |= zip(product.parameter_names, product.decay_gradients(source), strict=True)
            continue
        multipliers = decay_multipliers(*product.factors(source))
        for factor, (left, right) in zip(product.places, multipliers, strict=True):
            terms.multipliers[factor.name].append(Multiplier(factor, left, right))
    return terms


class Blocks(NamedTuple):
    """The rows, or heads, of which a factor in a flattened parameter consists; a term needs each of them complete."""

    factor: Factor
    columns: int
    heads: int
    rank: int
    by_head: bool  # a head is a block of rows of the parameter
    first: int  # where the first block begins
    size: int
    number: int

    @classmethod
    def of(cls, factor: Factor, shape: tuple[int, ...]) -> Blocks:
        """Return the blocks of a factor in a parameter of a shape."""
        columns, heads = shape[-1], math.prod(factor.heads or (1,))
        start, length = factor.section or (0, shape[factor.dim])
        rank = length // heads if factor.heads else columns
        if factor.heads and factor.dim == 0:
            return cls(factor, columns, heads, rank, True, start * columns, rank * columns, heads)
        return cls(factor, columns, heads, rank, False, 0, columns, math.prod(shape[:-1]))

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return where the blocks begin and end of which the range from ``start`` to ``stop`` holds a part."""
        low, high = max(start - self.first, 0) // self.size, min(-((self.first - stop) // self.size), self.number)
        low, high = (low, high) if start < stop and low < high else (0, 0)
        return self.first + low * self.size, self.first + high * self.size

    def are_cut(self, bounds: Sequence[int]) -> bool:
        """Return whether ranges that end at ``bounds`` cut a block."""
        inside = [bound - self.first for bound in bounds if self.first < bound < self.first + self.number * self.size]
        return any(place % self.size for place in inside)

    def matrices(self, flat: Tensor) -> Tensor:
        """Return blocks that follow one another, flat, as ``(heads, rows, r)``: a view."""
        rows = flat.view(-1, self.columns)
        if self.by_head:
            return rows.unflatten(0, (-1, self.rank)).mT
        if self.factor.section is not None:
            rows = rows.narrow(-1, *self.factor.section)
        return rows.unflatten(-1, (self.heads, -1)).movedim(-2, 0)


class _Held(NamedTuple):
    """The complete blocks of a factor of which this process holds a part: where they begin, and their values."""

    blocks: Blocks
    begin: int
    flat: Tensor

    def of_heads(self, matrices: Tensor, begin: int) -> Tensor:
        """Return, of one matrix for each head, those of the heads in what is held from ``begin`` on."""
        block = self.blocks
        low, high = (begin - block.first) // block.size, (self.begin + len(self.flat) - block.first) // block.size
        return matrices[low:high] if block.by_head else matrices


def _sharded_terms(products: Sequence[Product], shards: Shards) -> dict[str, Tensor]:
    """Return ``F_p`` of what is held here of each parameter with a factor, flat."""
    local = {name: shard.of(shard.owner.detach()).reshape(-1) for name, shard in shards.by_name.items()}
    entire = [factor for each in products for factor in (each.places if each.is_tensor else each.places[1:-1])]
    tall = [factor for each in products if not each.is_tensor for factor in (each.places[0], each.places[-1])]
    held = _complete([Blocks.of(factor, shards.by_name[factor.name].shape) for factor in tall], local, shards)
    sums = _sums(entire, held, local, shards)
    terms = {name: local[name].clone() for product in products for name in product.parameter_names}
    found: dict[tuple[str, int], Tensor] = {}  # by where it begins; factors beside each other share rows
    for product in products:
        matrices = [sums[factor] for factor in product.places]
        if product.is_tensor:
            cores = {factor.name: core for factor, core in zip(product.places, matrices, strict=True)}
            found |= {(name, 0): F.reshape(-1) for name, F in zip(cores, product.decay_gradients(cores), strict=True)}
            continue
        multipliers = multipliers_from_grams(*matrices)
        for factor, matrix, (left, right) in zip(product.places, matrices, multipliers, strict=True):
            if left is not None:
                found[factor.name, 0] = (left @ matrix @ right).reshape(-1)
                continue
            each, right = held[factor], right.expand(*(factor.heads or (1,)), *right.shape[-2:]).flatten(0, -3)
            out = found.setdefault((factor.name, each.begin), each.flat.clone())
            view = each.blocks.matrices
            view(out).copy_(view(each.flat) @ each.of_heads(right, each.begin))
    for (name, begin), F in found.items():
        low, high = _overlap(shards.by_name[name].range, (begin, begin + len(F)))
        _cut(terms[name], shards.by_name[name].start, low, high).copy_(_cut(F, begin, low, high))
    return terms


def _sums(
    entire: Sequence[Factor], held: Mapping[Factor, _Held], local: Mapping[str, Tensor], shards: Shards
) -> dict[Factor, Tensor]:
    """Return the Gram matrices ``(*heads, r, r)`` of factors, and those that are taken entire, by one message."""
    shapes = {factor: shards.by_name[factor.name].shape for factor in entire}
    shapes |= {factor: (*(factor.heads or ()), each.blocks.rank, each.blocks.rank) for factor, each in held.items()}
    sizes = list(map(math.prod, shapes.values()))
    example = local[next(iter(shapes)).name]
    message = example.new_zeros(sum(sizes), dtype=torch.promote_types(example.dtype, torch.float32))
    totals = dict(zip(shapes, message.split(sizes), strict=True))
    for factor, total in totals.items():
        shard = shards.by_name[factor.name]
        if shard.group is None and shards.processes.rank > 0:
            continue  # of what every process holds, one share counts
        if factor not in held:
            total[shard.start : shard.stop] = local[factor.name]
            continue
        each = held[factor]
        block, r = each.blocks, each.blocks.rank
        own = block.first - (block.first - shard.start) // block.size * block.size  # before it others count theirs
        begin = max(each.begin, own)
        x = block.matrices(each.flat[begin - each.begin :])
        each.of_heads(total.view(block.heads, r, r), begin).add_(x.mT @ x)
    shards.processes.sum_(message)
    return {factor: total.to(local[factor.name].dtype).view(shapes[factor]) for factor, total in totals.items()}


def _complete(blocks: Sequence[Blocks], local: Mapping[str, Tensor], shards: Shards) -> dict[Factor, _Held]:
    """Complete the blocks of which this process holds a part, by what others hold of them."""
    nothing = next(iter(local.values())).new_empty(0)
    outgoing: list[list[Tensor]] = [[nothing] for _ in range(shards.processes.size)]
    incoming: list[list[int]] = [[] for _ in range(shards.processes.size)]
    holders: dict[Factor, list[int]] = {}  # of the blocks of which a part is here
    for block in blocks:
        shard, flat = shards.by_name[block.factor.name], local[block.factor.name]
        span = block.span(*shard.range)
        ranges = list(itertools.pairwise(shard.bounds))
        lengths = [high - low for low, high in (_overlap(each, span) for each in ranges)]
        holders[block.factor] = [rank for rank, length in enumerate(lengths) if length]
        for rank in set(holders[block.factor]) - {shard.rank}:
            outgoing[rank].append(_cut(flat, shard.start, *_overlap(shard.range, block.span(*ranges[rank]))))
            incoming[rank].append(lengths[rank])
    arrived: list[Iterator[Tensor]] = [iter(()) for _ in incoming]
    if any(block.are_cut(shards.by_name[block.factor.name].bounds) for block in blocks):
        received = shards.processes.exchange([torch.cat(each) for each in outgoing], [sum(each) for each in incoming])
        arrived = [iter(message.split(each)) for message, each in zip(received, incoming, strict=True)]
    held = {}
    for block in blocks:
        shard, flat = shards.by_name[block.factor.name], local[block.factor.name]
        begin, end = block.span(*shard.range)
        mine = _cut(flat, shard.start, *_overlap(shard.range, (begin, end)))
        parts = [mine if rank == shard.rank else next(arrived[rank]).to(flat.dtype) for rank in holders[block.factor]]
        held[block.factor] = _Held(block, begin, torch.cat(parts) if parts else mine)
    return held


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    low = max(one[0], other[0])
    return low, max(low, min(one[1], other[1]))


def _cut(flat: Tensor, start: int, low: int, high: int) -> Tensor:
    """Return the elements from ``low`` to ``high`` of what ``flat`` holds from ``start`` on."""
    return flat[low - start : high - start] if low < high else flat[:0]


class ProductDecay:
    """Takes products once in each step, also where an engine steps in parts."""

    def __init__(self) -> None:
        self._terms, self._ahead = DecayTerms(), set[str]()

    def take(self, products: Sequence[Product], source: Mapping[str, Tensor], shards: Shards | None) -> DecayTerms:
        """Take products as they are now, or where ZeRO steps in parts, as they are before the first part moves.

        Args:
            products: No two of them share an element of a parameter.
            source: Parameters by name; not needed where they are sharded.
            shards: Where they are sharded.
        """
        if shards is None:
            return _full_terms(products, source)
        if not shards.steps_in_parts:
            return DecayTerms(known=_sharded_terms(products, shards))
        due = {shard.name for _, held in shards.due for shard in held}
        if not due <= self._ahead:  # a new step begins
            self._terms = DecayTerms(known=_sharded_terms(products, shards))
            self._ahead = set(shards.by_name)
        self._ahead -= due
        return self._terms
