"""Batches of sentences of like length with about the same number of tokens each."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


def lengths_of(encoded: datasets.Dataset) -> NDArray[np.int64]:
    """Return the tokens of ``input_ids`` and ``labels`` of each pair, ``(pairs, 2)``."""
    table = encoded.with_format("arrow")[:]
    columns = [table[name].combine_chunks().value_lengths().to_numpy() for name in ("input_ids", "labels")]
    return np.stack(columns, axis=1).astype(np.int64)


def batch_bounds(costs: NDArray[np.int64], max_tokens: int) -> NDArray[np.int64]:
    """Cut sentences into batches that cost sentences x longest one, at most ``max_tokens``; a longer one is alone.

    Args:
        costs: Tokens of the sentences, ascending.
        max_tokens: Tokens of a batch.

    Returns:
        Batch ``i`` is ``costs[bounds[i]:bounds[i + 1]]``.
    """
    bounds = [0]
    for row, cost in enumerate(costs):
        if row > bounds[-1] and (row + 1 - bounds[-1]) * cost > max_tokens:
            bounds.append(row)
    return np.array([*bounds, len(costs)])


class LengthBatchSampler(Sampler[list[int]]):
    """Sampler of batches of pairs of like length; equal (lengths, seed, epoch) give the same ones in the same order.

    A batch costs sentences x longest sentence, source or target, whichever is larger, as fairseq counts its
    ``--max-tokens``. Pairs are sorted by length, equal ones in an order of each epoch, and cut into batches; every
    epoch shuffles these and has as many of them as any other, a multiple of ``num_processes``, for which the first ones
    come twice if need be.

    Args:
        lengths: Tokens of source and target of each pair, ``(pairs, 2)``.
        max_tokens: Cost of a batch at most, unless one pair alone has more.
        seed: Of the shuffling.
        num_processes: Processes to which the batches will be dealt out in turn.
    """

    def __init__(self, lengths: NDArray[np.int64], *, max_tokens: int, seed: int = 0, num_processes: int = 1) -> None:
        self.lengths, self.seed, self.num_processes, self.epoch = lengths, seed, num_processes, 0
        # Sorted by cost first, the cuts depend on no epoch.
        self._bounds = batch_bounds(np.sort(lengths.max(axis=1)), max_tokens)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        batches = len(self._bounds) - 1
        return -(-batches // self.num_processes) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        shuffled = rng.permutation(len(self.lengths))
        source, target = self.lengths[shuffled].T
        order = shuffled[np.lexsort((target, source, np.maximum(source, target)))]
        batches = np.split(order, self._bounds[1:-1])
        for number in np.resize(rng.permutation(len(batches)), len(self)):
            yield batches[number].tolist()
