"""Files with ranges of flattened tensors, and reading any other ranges from them.

A file is one of safetensors whose tensors are flat pieces. Its metadata say under ``ranges``, as JSON, of which tensor
each is a piece, and from where to where: ``{"exp_avg/encoder.weight": {"shape": [24, 40], "start": 0, "stop": 480}}``.
"""

from __future__ import annotations

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

PIECES_FILES = "shard-*-of-*.safetensors"
_RANGES = "ranges"
_FACTS = "facts"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pieces_file(number: int, count: int) -> str:
    """Name of the file of one process."""
    return f"shard-{number:05}-of-{count:05}.safetensors"


@dataclass(frozen=True)
class Range:
    """The elements ``[start, stop)`` of a row-major flattened tensor of a shape."""

    shape: tuple[int, ...]
    start: int
    stop: int


def write_pieces(path: Path, pieces: Mapping[str, tuple[Range, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write pieces of tensors; other threads run meanwhile, which safetensors' own writer does not let them.

    Args:
        path: The file.
        pieces: The flat piece of each tensor, and which it is.
        facts: What else is to be known, as JSON can hold it.
    """
    ranges = {key: asdict(span) for key, (span, _) in pieces.items()}
    header: dict[str, Any] = {"__metadata__": {_RANGES: json.dumps(ranges), _FACTS: json.dumps(facts)}}
    end = 0
    for key, (_, piece) in pieces.items():
        start, end = end, end + piece.numel() * piece.element_size()
        header[key] = {"dtype": _DTYPES[piece.dtype], "shape": [piece.numel()], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, piece in pieces.values():
            file.write(piece.detach().cpu().contiguous().view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class _Source:
    """A piece in a file, or, if it has a shape, a whole tensor as models are saved."""

    file: Any
    key: str
    start: int
    stop: int
    whole: bool
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``[start, stop)`` of the flattened tensor, all of which are here."""
        if not self.whole:
            return self.file.get_slice(self.key)[start - self.start : stop - self.start]
        if not self.shape:
            return self.file.get_tensor(self.key).reshape(1)
        width = math.prod(self.shape[1:])
        first = start // width
        rows = self.file.get_slice(self.key)[first : -(-stop // width)]
        return rows.reshape(-1)[start - first * width : stop - first * width]


class Pieces(AbstractContextManager):
    """The tensors that lie in pieces in the files of a checkpoint; close it when all is read.

    Args:
        files: Files of pieces.
        models: Files with the weights of a model, which hold whole tensors, found under ``weight/``.
    """

    def __init__(self, files: Sequence[Path], models: Sequence[Path] = ()) -> None:
        self._open = ExitStack()
        self._sources: dict[str, list[_Source]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.facts: list[Mapping[str, Any]] = []
        self._files = [*files, *models]
        for path in files:
            self._add_pieces(path)
        for path in models:
            self._add_model(path)

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def __contains__(self, key: str) -> bool:
        return key in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype that a tensor was saved in."""
        source = self._sources[key][0]
        return {name: dtype for dtype, name in _DTYPES.items()}[source.file.get_slice(source.key).get_dtype()]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements ``[start, stop)`` of a flattened tensor, from whatever files hold them.

        Raises:
            KeyError: If no file holds any of the tensor.
            ValueError: If the files do not hold all of the range.
        """
        if key not in self._sources:
            raise KeyError(f"{key} is in none of {', '.join(map(str, self._files)) or 'no files'}")
        stop = math.prod(self.shapes[key]) if stop is None else stop
        found, position = [], start
        for source in sorted(self._sources[key], key=lambda source: source.start):
            if source.start <= position < min(source.stop, stop):
                end = min(source.stop, stop)
                found.append(source.read(position, end))
                position = end
        if position < stop:
            raise ValueError(f"elements {position:,} to {stop:,} of {key} are in none of the files of the checkpoint")
        return torch.cat(found) if found else torch.empty(0, dtype=self.dtype(key))

    def _add_pieces(self, path: Path) -> None:
        file = self._open.enter_context(safe_open(path, framework="pt"))
        metadata = file.metadata()
        self.facts.append(json.loads(metadata[_FACTS]))
        for key, span in json.loads(metadata[_RANGES]).items():
            self._add(_Source(file, key, span["start"], span["stop"], False, tuple(span["shape"])), key)

    def _add_model(self, path: Path) -> None:
        file = self._open.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118, for it is no dictionary
            shape = tuple(file.get_slice(name).get_shape())
            self._add(_Source(file, name, 0, math.prod(shape), True, shape), f"weight/{name}")

    def _add(self, source: _Source, key: str) -> None:
        self._sources[key].append(source)
        self.shapes[key] = source.shape
