"""The step of LAMB as three launches over all tensors of a group, written in Triton.

A table of addresses goes to the device, so that one program serves every tensor; each program takes a chunk of one. The
host waits for nothing. Importing this file needs Triton, which comes with torch for GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
# Of the table: addresses of parameter, gradient, both moments, decay term and update; elements.
_COLUMNS = tl.constexpr(7)
_CHUNK, _BLOCK = tl.constexpr(2**15), tl.constexpr(2**10)


@triton.jit
def _directions(  # type: ignore[no-untyped-def]
    table, row_of, first_of, corrections, parts, keep1, take1, keep2, take2, eps, weight_decay, DTYPE: tl.constexpr
):
    """Move the moments of a chunk, write its update, and both of its squared norms into ``parts``."""
    chunk = tl.program_id(0)
    row = tl.load(row_of + chunk)
    columns = table + row * _COLUMNS
    p = tl.load(columns).to(tl.pointer_type(DTYPE))
    g = tl.load(columns + 1).to(tl.pointer_type(DTYPE))
    m = tl.load(columns + 2).to(tl.pointer_type(DTYPE))
    v = tl.load(columns + 3).to(tl.pointer_type(DTYPE))
    term = tl.load(columns + 4).to(tl.pointer_type(DTYPE))
    u = tl.load(columns + 5).to(tl.pointer_type(DTYPE))
    numel = tl.load(columns + 6)
    rate, root = tl.load(corrections + 2 * row), tl.load(corrections + 2 * row + 1)
    of_parameter = tl.zeros((_BLOCK,), tl.float32)
    of_update = tl.zeros((_BLOCK,), tl.float32)
    begin = (chunk - tl.load(first_of + row)) * _CHUNK
    for start in range(0, _CHUNK, _BLOCK):
        i = begin + start + tl.arange(0, _BLOCK)
        inside = i < numel
        grad = tl.load(g + i, inside, 0.0).to(tl.float32)
        first = keep1 * tl.load(m + i, inside, 0.0).to(tl.float32) + take1 * grad
        second = keep2 * tl.load(v + i, inside, 0.0).to(tl.float32) + take2 * grad * grad
        decay = weight_decay * tl.load(term + i, inside, 0.0).to(tl.float32)
        update = (tl.div_rn(first * rate, tl.sqrt_rn(second) * root + eps) + decay).to(DTYPE)
        tl.store(m + i, first.to(DTYPE), inside)
        tl.store(v + i, second.to(DTYPE), inside)
        tl.store(u + i, update, inside)
        value = tl.load(p + i, inside, 0.0).to(tl.float32)
        of_parameter += value * value
        of_update += tl.where(inside, update.to(tl.float32) * update.to(tl.float32), 0.0)
    tl.store(parts + 2 * chunk, tl.sum(of_parameter))
    tl.store(parts + 2 * chunk + 1, tl.sum(of_update))


@triton.jit
def _sums(first_of, parts, squares):  # type: ignore[no-untyped-def]
    """Add up the parts of a row, in an order that does not change."""
    row = tl.program_id(0)
    first, last = tl.load(first_of + row), tl.load(first_of + row + 1)
    of_parameter = tl.zeros((128,), tl.float32)
    of_update = tl.zeros((128,), tl.float32)
    while first < last:
        i = first + tl.arange(0, 128)
        of_parameter += tl.load(parts + 2 * i, i < last, 0.0)
        of_update += tl.load(parts + 2 * i + 1, i < last, 0.0)
        first += 128
    tl.store(squares + 2 * row, tl.sum(of_parameter))
    tl.store(squares + 2 * row + 1, tl.sum(of_update))


@triton.jit
def _move(table, row_of, first_of, rates, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add its update, times the rate of its row, to a chunk of a parameter."""
    chunk = tl.program_id(0)
    row = tl.load(row_of + chunk)
    columns = table + row * _COLUMNS
    p = tl.load(columns).to(tl.pointer_type(DTYPE))
    u = tl.load(columns + 5).to(tl.pointer_type(DTYPE))
    numel = tl.load(columns + 6)
    rate = tl.load(rates + row)
    begin = (chunk - tl.load(first_of + row)) * _CHUNK
    for start in range(0, _CHUNK, _BLOCK):
        i = begin + start + tl.arange(0, _BLOCK)
        inside = i < numel
        update = tl.load(u + i, inside, 0.0).to(tl.float32)
        tl.store(p + i, (tl.load(p + i, inside, 0.0).to(tl.float32) + rate * update).to(DTYPE), inside)


class Launches:
    """The launches of one step over tensors on one device and of one dtype.

    Args:
        rows: Parameter, gradient, both moments, decay term and update of each tensor, contiguous.
    """

    def __init__(self, rows: Sequence[Sequence[Tensor]]) -> None:
        example = rows[0][0]
        self._rows, self._device, self._dtype = rows, example.device, DTYPES[example.dtype]
        addresses = torch.tensor([[*(tensor.data_ptr() for tensor in row), row[0].numel()] for row in rows])
        if self._device.type == "cuda":  # the host goes on while pinned memory is copied
            addresses = addresses.pin_memory()
        self._table = addresses.to(self._device, non_blocking=True)
        self._chunks, self._row_of, self._first_of = _chunks(tuple(row[0].numel() for row in rows), self._device)

    def directions(self, steps: Sequence[Tensor], group: dict[str, Any]) -> Tensor:
        """Move the moments and form the updates; returns the squared norms of parameters and updates, ``(rows, 2)``."""
        beta1, beta2 = group["betas"]
        counts = torch.stack(list(steps)).double()
        corrections = torch.stack([1 / (1 - beta1**counts), (1 / (1 - beta2**counts)).sqrt()], dim=1).float()
        parts = torch.empty(self._chunks, 2, device=self._device, dtype=torch.float32)
        squares = torch.empty(len(self._rows), 2, device=self._device, dtype=torch.float32)
        betas = (beta1, 1 - beta1, beta2, 1 - beta2)
        where = (self._table, self._row_of, self._first_of)
        options = (*betas, float(group["eps"]), float(group["weight_decay"]))
        with torch.cuda.device_of(self._table):
            if self._chunks:
                _directions[(self._chunks,)](*where, corrections, parts, *options, DTYPE=self._dtype)
            _sums[(len(self._rows),)](self._first_of, parts, squares)
        return squares

    def move(self, rates: Tensor) -> None:
        """Add the updates, each times its rate, to the parameters."""
        if self._chunks:
            with torch.cuda.device_of(self._table):
                _move[(self._chunks,)](self._table, self._row_of, self._first_of, rates.float(), DTYPE=self._dtype)


@functools.lru_cache(maxsize=256)
def _chunks(numels: tuple[int, ...], device: torch.device) -> tuple[int, Tensor, Tensor]:
    """How many chunks there are, the row of each, and the first of each row, and one more."""
    counts = torch.tensor([-(-numel // _CHUNK.value) for numel in numels])
    first_of = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    row_of = torch.repeat_interleave(torch.arange(len(numels)), counts)
    return len(row_of), row_of.to(device), first_of.to(device)


@functools.cache
def problem_on(device: torch.device) -> str | None:
    """What is wrong with the kernels there, if anything: a step of two chunks beside its formula."""
    wave = torch.arange(_CHUNK.value + 3, device=device, dtype=torch.float32)  # no random numbers: they are others'
    p, g, m, v, term, u = (torch.sin(wave * (i + 1)) for i in range(6))
    v = v.square()
    group = {"betas": (0.9, 0.99), "eps": 1e-2, "weight_decay": 0.1}
    first, second = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g.square()
    update = first / (1 - 0.9**2) / ((second / (1 - 0.99**2)).sqrt() + 1e-2) + 0.1 * term
    squares = torch.stack([p.square().sum(), update.square().sum()])[None]
    expected = (p - 0.5 * update, first, second, update, squares)
    try:
        launched = Launches([(p, g, m, v, term, u)])
        found_squares = launched.directions([torch.full((), 2.0, device=device)], group)
        launched.move(torch.full((1,), -0.5, device=device))
    except Exception as error:  # of Triton, of its compiler or of the driver
        return f"{type(error).__name__}: {error}"
    close = [torch.allclose(*pair, 1e-4, 1e-5) for pair in zip((p, m, v, u, found_squares), expected, strict=True)]
    return None if all(close) else "its results are wrong"
