"""What the processes of a run agree upon: objects from all of them, and errors that end all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

T = TypeVar("T")


def gather(item: T) -> list[T]:
    """The items of all processes in the order of their ranks; of this one alone where there is no process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(items, item)
    return items


def together(action: Callable[[], T]) -> T:
    """Do in every process what may fail in some of them, and let it fail in all.

    Without this a process whose disk lacks a file ends alone, and the others wait for it in their next collective.

    Args:
        action: Called once. All processes of the run must call :func:`together` here, and ``action`` must not itself
            call a collective after something that may fail.

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
