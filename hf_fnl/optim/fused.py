"""The step of LAMB as one compiled call on a CPU with a C++ compiler; which kernels a device has.

``lamb.cpp`` reads and writes what two passes have to, and takes all tensors of a call; kernels of ``torch.compile``
took half again as long for the first pass, and 0.1 ms more for each tensor.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {torch.float32: "lamb_float32", torch.float64: "lamb_float64", torch.bfloat16: "lamb_bfloat16"}
_SOURCE = Path(__file__).with_name("lamb.cpp")
# No option that changes what numbers mean for others in this process, as -ffast-math does for denormal ones.
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC"]


class Row(NamedTuple):
    """The tensors of one update, contiguous, on a CPU, of one dtype and size; ``step`` is a float32 number.

    ``term`` is what ``weight_decay`` multiplies; ``update`` is overwritten, and may be ``term``.
    """

    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    term: Tensor
    update: Tensor
    step: Tensor


class _Options(ctypes.Structure):
    _fields_ = [(name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")] + [
        ("moves", ctypes.c_int64)
    ]


def takes(parameter: Tensor, grad: Tensor) -> bool:
    """Whether the kernels of its device take a parameter with this gradient."""
    # A gradient in another dtype, float64 on a GPU, or a tensor without memory, as those that trace a step.
    known = parameter.dtype in (DTYPES if parameter.is_cpu else (torch.float32, torch.bfloat16))
    return known and grad.dtype == parameter.dtype and parameter.is_contiguous() and type(parameter) is Tensor


def update_rows(rows: Sequence[Row], group: dict[str, Any], *, moves: bool) -> Tensor:
    """Move the moments and form the updates of tensors of one dtype, and move the tensors by them if told to.

    Args:
        rows: The tensors. With ``moves`` they may share the memory of their updates, for they move one by one.
        group: ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        moves: Whether the parameters move.

    Returns:
        The squared norms of parameters, before they move, and of updates, shape ``(rows, 2)``, in float32 or better.

    Raises:
        RuntimeError: If this machine cannot compile the kernels.
    """
    dtype = rows[0].parameter.dtype
    table = torch.tensor([_numbers(row) for row in rows], dtype=torch.int64)
    squares = torch.empty(len(rows), 2, dtype=torch.float64)
    betas = (float(beta) for beta in group["betas"])
    options = _Options(float(group["lr"]), *betas, float(group["eps"]), float(group["weight_decay"]), moves)
    kernel = getattr(check(), DTYPES[dtype])
    kernel(table.data_ptr(), len(rows), ctypes.addressof(options), squares.data_ptr(), torch.get_num_threads())
    return squares.to(torch.promote_types(dtype, torch.float32))


def _numbers(row: Row) -> tuple[int, ...]:
    p, grad, exp_avg, exp_avg_sq, term, update, step = row
    addresses = p.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), term.data_ptr()
    return (*addresses, update.data_ptr(), step.data_ptr(), p.numel())


def are_for(device: torch.device, *, asked: bool, worth: bool) -> bool:
    """Whether kernels update what is on a device; they are compiled the first time.

    Args:
        device: Any.
        asked: Somebody wants kernels, whatever they cost.
        worth: There is enough on the device to earn what a C++ compiler takes.

    Raises:
        RuntimeError: If somebody wants them and there is no compiler, or what it compiled is wrong.
    """
    if device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing() and gpu_kernels_work(device, asked=asked)
    if device.type == "cpu" and asked:
        check()
    return device.type == "cpu" and (asked or (worth and is_available()))


def gpu_kernels_work(device: torch.device, *, asked: bool = False) -> bool:
    """Whether there is Triton, and what it compiles does what operations of torch do; tried once in a process.

    Raises:
        RuntimeError: If not, and somebody wants the kernels.
    """
    if importlib.util.find_spec("triton") is None:
        problem: str | None = "Triton is not installed; it comes with torch for GPUs"
    else:
        from hf_fnl.optim.fused_gpu import problem_on

        problem = problem_on(device)
    if problem is not None and asked:
        raise RuntimeError(f"fused=True does not work on {device}, use fused=None or False: {problem}")
    return problem is None


def is_available() -> bool:
    """Whether the kernels for a CPU are compiled, or could be just now."""
    return not isinstance(_library(), str)


def check() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: If this machine cannot compile them.
    """
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"fused=True needs a C++ compiler, use fused=None or False: {library}")
    return library


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none. Every process compiles its own, for its own processor: a second."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no c++ or g++, and CXX names none"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "lamb.so"
        try:
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return done.stderr.strip()[-1000:]
            library = ctypes.CDLL(str(built))
        except OSError as error:
            return str(error)
    for name in DTYPES.values():
        kernel = getattr(library, name)
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        kernel.restype = None
    return library
