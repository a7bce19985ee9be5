"""Memory that a step needs at its peak, on a GPU and on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; memory that an operation uses inside is not seen.

    Args:
        present: Tensors that are there from the start.
    """

    def __init__(self, present: Sequence[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in present:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        returned = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, returned)
        return returned

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)


def peak_bytes(step: Callable[[], object], present: Sequence[Tensor]) -> int:
    """Bytes at the peak of a step, with the tensors that are there from the start and without others."""
    if present[0].device.type == "cpu":
        with LiveMemory(present) as memory:
            step()
        return memory.peak
    others = torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in present)
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - others
