"""Values that the processes of a run exchange, and errors that end all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def process() -> tuple[int, int]:
    """Number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the process that does what is done once."""
    return process()[0] == 0


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; of this one alone where there is no process group."""
    count = process()[1]
    values: list[Any] = [value] * count
    if count > 1:
        dist.all_gather_object(values, value)
    return values


def close_process_group() -> None:
    """Wait for the other processes and close what connects them, the last that a script of several processes does.

    Without this the threads of the process group run on while the interpreter ends, which now and then aborts a process
    whose work is all done, and its launcher reports a failure.
    """
    if process()[1] > 1:
        dist.barrier()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def raise_on_all(action: Callable[[], T]) -> T:
    """Do what may fail in some processes, and fail in all if it failed in one.

    Without this a process whose disk lacks a file ends alone, and the others wait for it in their next collective.

    Args:
        action: Called once. All processes of the run must call :func:`raise_on_all` here, and ``action`` must not
            itself call a collective after something that may fail.

    Returns:
        What ``action`` returns.

    Raises:
        Exception: What ``action`` raised in this process.
        RuntimeError: If it failed elsewhere only; names the processes and their errors.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    messages = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed := [f"process {rank}: {message}" for rank, message in enumerate(messages) if message is not None]:
        raise RuntimeError("; ".join(failed))
    return result


def first_decides(action: Callable[[], T]) -> T:
    """Return on all processes what an action returns on the first.

    Raises:
        Exception: As :func:`raise_on_all`.
    """
    return gather(raise_on_all(lambda: action() if is_first() else None))[0]  # type: ignore[return-value]
