"""Streams of examples that every process reads for itself, and that go on at the record where a run stopped.

A stream lies in a fixed number of shards, whoever reads it, and each example is a pure function of its shard, the epoch
of this shard and its place there. The readers, one for every data loader worker of every process, share out the shards
and never need each other. A reader that has read all its shards begins their next epoch, so none runs dry before the
others. How far a shard has been trained on is the list ``[epoch, *place]``; these lists are all that a checkpoint
needs, and any number of readers can go on from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

Example = Mapping[str, Tensor]

_ORDER = 5  # first word of the seed of the shards' order; those of examples begin with other words


class Epoch:
    """An epoch number in shared memory, so that persistent data loader workers see it change."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; a data loader of accelerate calls this."""
        self._epoch.fill_(epoch)


class ShardedStream(Epoch, IterableDataset, ABC):
    """Examples in shards. Iterating over it is one pass in the epoch set, shared out to a data loader's workers.

    Attributes:
        num_shards: Number of shards, which does not depend on who reads them.
        seed: Seed of the order in which a reader takes its shards.
        start: The place where every shard begins.
    """

    num_shards: int
    seed: int
    start: tuple[int, ...]

    @abstractmethod
    def read(self, shard: int, epoch: int, place: Sequence[int]) -> Iterator[tuple[Example, tuple[int, ...]]]:
        """Read a shard from a place on.

        Args:
            shard: Its number.
            epoch: Which pass over this shard it is.
            place: ``start``, or a place that came with an example of the same shard and epoch.

        Yields:
            An example, and the place behind it.
        """

    def identity(self) -> dict[str, Any]:
        """What gives places their meaning, fit for JSON: a run goes on only where it is as it was."""
        return {"num_shards": self.num_shards, "seed": self.seed}

    def files(self) -> dict[str, int]:
        """The local files that are read, with their sizes in bytes.

        Raises:
            OSError: If one cannot be opened.
        """
        return {}

    def __iter__(self) -> Iterator[Example]:
        worker, workers = this_worker()
        for placed in Reader(self, worker=worker, workers=workers, only_epoch=int(self._epoch)):
            yield placed.example


def this_worker() -> tuple[int, int]:
    """Number of this data loader worker, and how many this process has; one where it reads without any."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


class Placed(NamedTuple):
    """An example, its shard, and how far this shard has been read with it: ``[epoch, *place]``."""

    example: Example
    shard: int
    reached: list[int]


class Reader:
    """One of the readers among whom the shards of a stream are shared out.

    It takes the shards of the lowest epoch first; of these, those that are begun; the others in an order drawn from the
    seed and the epoch.

    Args:
        stream: The stream.
        rank: Number of the process.
        world: Number of processes.
        worker: Number of the data loader's worker in its process.
        workers: Workers of each process.
        progress: How far shards have been read, those of other readers too; the others are at their beginning.
        only_epoch: Make one pass, this one, instead of one after another for ever.
    """

    def __init__(
        self,
        stream: ShardedStream,
        *,
        rank: int = 0,
        world: int = 1,
        worker: int = 0,
        workers: int = 1,
        progress: Mapping[int, Sequence[int]] | None = None,
        only_epoch: int | None = None,
    ) -> None:
        # Processes come first, so that few shards leave workers idle rather than a process.
        self.shards = range(worker * world + rank, stream.num_shards, world * workers)
        self.stream, self.only_epoch = stream, only_epoch
        self.progress = progress or {}

    def __iter__(self) -> Iterator[Placed]:
        begin = [self.only_epoch or 0, *self.stream.start]
        reached = {shard: list(self.progress.get(shard, begin)) for shard in self.shards}
        in_vain = 0
        while reached:
            shard = self._next(reached)
            epoch, *place = reached[shard]
            if self.only_epoch is not None and epoch > self.only_epoch:
                return
            in_vain += 1
            for example, after in self.stream.read(shard, epoch, place):
                reached[shard], in_vain = [epoch, *after], 0
                yield Placed(example, shard, reached[shard])
            reached[shard] = [epoch + 1, *self.stream.start]
            # Shards that a checkpoint left at their ends give nothing once; then each must have been empty throughout.
            if in_vain == 2 * len(reached) and self.only_epoch is None:
                raise ValueError(
                    f"no example in the shards {[*self.shards]} of {self.stream.num_shards}: lower stream_shards"
                )

    def _next(self, reached: Mapping[int, Sequence[int]]) -> int:
        epoch = min(each[0] for each in reached.values())
        order = np.random.default_rng([_ORDER, self.stream.seed, epoch]).permutation(self.stream.num_shards)
        begin = [epoch, *self.stream.start]
        current = (shard for shard, each in reached.items() if each[0] == epoch)
        return min(current, key=lambda shard: (reached[shard] == begin, order[shard]))
