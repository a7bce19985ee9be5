"""What processes do together: an error of one is an error of all, so that none waits for another in vain."""

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


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in their order."""
    count = process()[1]
    values = [value] * count
    if count > 1:
        dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> T:
    """Run an action, which must not talk to other processes, on all of them.

    Returns:
        What it returned here.

    Raises:
        Exception: What it raised here.
        RuntimeError: If it raised on another process only.
    """
    error, result = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    told = gathered(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if faults := [f"process {number}: {text}" for number, text in enumerate(told) if text]:
        raise RuntimeError("; ".join(faults))
    return result  # type: ignore[return-value]


def first_decides(action: Callable[[], T]) -> T:
    """What an action returns on the first process, on all of them.

    Raises:
        Exception: As :func:`together`.
    """
    return gathered(together(lambda: action() if is_first() else None))[0]


def replica(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Among how many copies of what ``group`` divides this process holds a part, and of which.

    All processes must call this, with groups that divide the same tensors.

    Args:
        group: The processes that divide tensors; ``None`` if each holds them whole.

    Returns:
        The number of the copy, and how many there are.
    """
    if group is None:
        return process()
    head = min(dist.get_process_group_ranks(group))
    heads = sorted(set(gathered(head)))
    return heads.index(head), len(heads)
