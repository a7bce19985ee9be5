"""Rows about the layers of a model, those of one shape in one place under one name: ``layers.0-29.mlp.up_proj``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_Numbered = list[tuple[tuple[int, ...], Row]]


def groups_of(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Return names with ranges of numbers, and the rows that each stands for.

    Args:
        rows: Each with the ``name``, ``kind`` and ``shape`` of a matrix.
    """
    alike: dict[tuple[Any, ...], _Numbered] = {}
    for row in rows:
        parts = row["name"].split(".")
        numbers = tuple(int(part) for part in parts if part.isdigit())
        place = tuple(None if part.isdigit() else part for part in parts)
        alike.setdefault((place, row["kind"], tuple(row["shape"])), []).append((numbers, row))
    return [group for (place, *_), members in alike.items() for group in _named(place, members)]


def module_of(name: str) -> str:
    """Return the name down to its last number, or else of the module around: what rows in one place have in common."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts[:-1]) if part[0].isdigit()]
    return ".".join(parts[: numbered[-1] + 1] if numbered else parts[:-1])


def _named(place: Sequence[str | None], members: _Numbered) -> Iterator[tuple[str, list[Row]]]:
    """One name, where the numbers of each position go with all those of the others; otherwise several."""
    values = [sorted(set(column)) for column in zip(*(numbers for numbers, _ in members), strict=True)]
    if math.prod(map(len, values)) == len(members):
        ranges = iter(map(_ranges, values))
        yield ".".join(next(ranges) if part is None else part for part in place), [row for _, row in members]
        return
    first = next(position for position, numbers in enumerate(values) if len(numbers) > 1)
    for value in values[first]:
        yield from _named(place, [member for member in members if member[0][first] == value])


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,7`` for 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
