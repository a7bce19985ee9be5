"""Rows and heads that boundaries between processes cut, made whole wherever a part of them lies."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_fnl.optim.sharding import Collectives, Fragment
from hf_fnl.optim.units import Units

Ranges = Mapping[str, Sequence[tuple[int, int]]]  # of each process, by the name of the parameter


class Piece(NamedTuple):
    """A unit of a factor, by where it lies in its flattened parameter; factors beside each other share rows."""

    name: str
    begin: int
    size: int

    def overlap(self, start: int, stop: int) -> tuple[int, int]:
        """The part of a range that lies in this piece; empty if the second number is not above the first."""
        return max(start, self.begin), min(stop, self.begin + self.size)

    def holders(self, ranges: Ranges) -> list[int]:
        """The processes that hold a part of it."""
        overlaps = [self.overlap(start, stop) for start, stop in ranges[self.name]]
        return [rank for rank, (low, high) in enumerate(overlaps) if low < high]

    def part_of(self, flat: Tensor, fragment: Fragment) -> Tensor:
        """The part of the piece in a flat tensor that has the range of a fragment; a view."""
        low, high = self.overlap(fragment.start, fragment.stop)
        return flat.narrow(0, low - fragment.start, high - low)


def ranges_of(names: Iterable[str], fragments: Mapping[str, Fragment], collectives: Collectives | None) -> Ranges:
    """What every process holds of parameters; nothing for those that all hold whole."""
    if collectives is None:
        return {name: [] for name in names}
    divided = [name for name in names if fragments[name].group is not None]
    held = collectives.gather({name: (fragments[name].start, fragments[name].stop) for name in divided})
    return {name: [ranges[name] for ranges in held] if name in held[0] else [] for name in names}


def cut_pieces(unit: Units, ranges: Ranges) -> dict[int, Piece]:
    """The units of a factor that no process holds whole, by number."""
    boundaries = {end for held in ranges[unit.factor.name] for end in held}
    return {number: Piece(unit.factor.name, unit.begin(number), unit.size) for number in unit.cut(boundaries)}


def make_whole(
    pieces: Iterable[Piece], ranges: Ranges, fragments: Mapping[str, Fragment], collectives: Collectives
) -> dict[Piece, Tensor]:
    """The pieces of which this process holds a part, flat; the others that do send theirs.

    Args:
        pieces: The same, in the same order, on every process.
        ranges: Where their parameters lie.
        fragments: What is held here.
        collectives: How the processes talk.
    """
    shared = {piece: holders for piece in pieces if len(holders := piece.holders(ranges)) > 1}
    if not shared:
        return {}
    mine = {piece: holders for piece, holders in shared.items() if collectives.rank in holders}
    parts = {piece: piece.part_of(fragments[piece.name].data, fragments[piece.name]) for piece in mine}
    dtypes = [fragments[piece.name].local.dtype for piece in shared]
    nothing = next(iter(fragments.values())).local.new_empty(0, dtype=functools.reduce(torch.promote_types, dtypes))
    arrived = _swap(parts, mine, ranges, nothing, collectives)
    whole = {}
    for piece, holders in mine.items():
        each = [parts[piece] if rank == collectives.rank else next(arrived[rank]) for rank in holders]
        whole[piece] = torch.cat(each).to(parts[piece].dtype)
    return whole


def _swap(
    parts: Mapping[Piece, Tensor],
    holders: Mapping[Piece, Sequence[int]],
    ranges: Ranges,
    nothing: Tensor,
    collectives: Collectives,
) -> list[Iterator[Tensor]]:
    """Send each part to the other holders of its piece; returns theirs, by process, in the order of the pieces."""
    outgoing: list[list[Tensor]] = [[nothing] for _ in range(collectives.size)]
    lengths: list[list[int]] = [[] for _ in range(collectives.size)]
    for piece, part in parts.items():
        for other in set(holders[piece]) - {collectives.rank}:
            outgoing[other].append(part)
            lengths[other].append(_length(piece, ranges, other))
    received = collectives.exchange([torch.cat(tensors) for tensors in outgoing], list(map(sum, lengths)), "cuts")
    return [iter(message.split(each)) for message, each in zip(received, lengths, strict=True)]


def _length(piece: Piece, ranges: Ranges, rank: int) -> int:
    low, high = piece.overlap(*ranges[piece.name][rank])
    return high - low
