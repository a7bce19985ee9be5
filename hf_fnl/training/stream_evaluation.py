"""One pass over a stream, its shards shared out to the processes, each record in one batch of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch.utils.data import DataLoader, IterableDataset

from hf_fnl.training.stream_loader import Collator, check_alike
from hf_fnl.training.streaming import Example, Reader, ShardedStream, this_worker
from hf_fnl.utils.processes import gather


class EvaluationLoader(DataLoaderStateMixin):
    """Batches of one process for a Trainer's evaluation, as many as every other process has.

    As long as each process has a whole batch of its own shards, each keeps to itself. Where some have run dry, the
    examples that the others still have are shared out anew. The last batches are filled up with examples that were
    there before, behind the others, where accelerate's ``gather_for_metrics`` cuts them off.

    Args:
        stream: The stream; read in the epoch 0.
        collate: Makes a batch of examples.
        batch_size: Examples of a batch.
        rank: Number of this process.
        world: Number of processes, which make and use the loader together.
        **options: Of :class:`torch.utils.data.DataLoader`.

    Raises:
        ValueError: If processes do not see the same files.
        OSError: If a file cannot be opened.
        RuntimeError: If another process failed so.
    """

    def __init__(
        self,
        stream: ShardedStream,
        collate: Collator,
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        **options: Any,
    ) -> None:
        check_alike(stream)
        self.stream, self.collate, self.batch_size, self.rank, self.world = stream, collate, batch_size, rank, world
        self.options = options
        self.gradient_state = GradientState()
        self.reset()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.reset()
        self.gradient_state._add_dataloader(self)  # where gather_for_metrics looks for the remainder
        try:
            rounds = self._rounds()
            current = next(rounds, None)
            if current is None:
                raise ValueError("no example in the stream to evaluate on")
            while current is not None:
                following = next(rounds, None)
                examples, self.remainder = current
                self.end_of_dataloader = following is None
                yield self.collate(examples)
                current = following
        finally:
            self.gradient_state._remove_dataloader(self)

    def _rounds(self) -> Iterator[tuple[list[Example], int]]:
        """The examples of this process in each batch, and how many all have if some only fill up; otherwise 0."""
        whole = self.world * self.batch_size
        pool: list[Example] = []
        own = self._own_batches()
        while any(counts := gather(len(examples := next(own, [])))):
            if min(counts) == self.batch_size:
                yield examples, 0
                continue
            pool += [example for part in gather(examples) for example in part]
            while len(pool) >= whole:
                yield self._part(pool[:whole]), 0
                pool = pool[whole:]
        if pool:
            filled = [pool[index % len(pool)] for index in range(whole)]
            yield self._part(filled) if self.world > 1 else pool, len(pool)

    def _part(self, examples: list[Example]) -> list[Example]:
        return examples[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def _own_batches(self) -> Iterator[list[Example]]:
        shares = _Shares(self.stream, self.rank, self.world)
        # Its own generator, or evaluating would change what torch's draws for the training.
        generator = torch.Generator()
        yield from DataLoader(shares, batch_size=self.batch_size, collate_fn=_keep, generator=generator, **self.options)


class _Shares(IterableDataset):
    """What the workers of a process read in one pass."""

    def __init__(self, stream: ShardedStream, rank: int, world: int) -> None:
        self.stream, self.rank, self.world = stream, rank, world

    def __iter__(self) -> Iterator[Example]:
        worker, workers = this_worker()
        reader = Reader(self.stream, rank=self.rank, world=self.world, worker=worker, workers=workers, only_epoch=0)
        return (placed.example for placed in reader)


def _keep(examples: list[Example]) -> list[Example]:
    return examples
