"""Batches of a stream for the process that reads them, and how a Trainer goes on where a run stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_fnl.training.streaming import Example, Placed, Reader, ShardedStream, this_worker
from hf_fnl.utils.processes import gather, together

logger = logging.getLogger(__name__)

Collator = Callable[[list[Example]], dict[str, Any]]


class StreamLoader:
    """The batches of one process, without end; knows how far the batches reach that were taken from it.

    What its workers have read ahead does not count. The processes of a run make it together.

    Args:
        stream: The stream.
        collate: Makes a batch of examples.
        batch_size: Examples of a batch.
        rank: Number of this process.
        world: Number of processes.
        num_workers: Workers of each process; taken down to the shards that each process has.
        **options: Of :class:`torch.utils.data.DataLoader`.

    Raises:
        ValueError: If there are fewer shards than processes, or processes do not see the same files.
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
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        check_alike(stream)
        if stream.num_shards < world:
            raise ValueError(
                f"a stream in {stream.num_shards} shards is too little for {world} processes: set stream_shards to "
                f"{world} or more"
            )
        self.stream, self.collate, self.batch_size, self.rank, self.world = stream, collate, batch_size, rank, world
        self.num_workers = min(num_workers, stream.num_shards // world)
        if self.num_workers < num_workers:
            logger.warning(
                f"{self.num_workers} data loader workers instead of {num_workers}: each of {world} processes has so "
                f"many of {stream.num_shards} shards; more stream_shards would employ more"
            )
        self.options = options if self.num_workers else {**options, **_NO_WORKERS}
        self.progress: dict[int, list[int]] = {}
        self.batches = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            _Readers(self.stream, self.rank, self.world, dict(self.progress), self.batches),
            batch_size=self.batch_size,
            collate_fn=_PlacedCollator(self.collate),
            num_workers=self.num_workers,
            # Of its own, or a loader would draw from torch's generator, and a resumed run's dropout would differ.
            generator=torch.Generator(),
            **self.options,
        )
        for batch, reached in loader:
            self.progress |= reached
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """How far the stream has been taken by all processes, who call this together; fit for JSON."""
        own = {shard: reached for shard, reached in self.progress.items() if shard % self.world == self.rank}
        progress = {str(shard): reached for part in gather(own) for shard, reached in part.items()}
        return {"identity": self.stream.identity(), "batches": self.batches, "progress": progress}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, by however many processes and workers.

        Raises:
            ValueError: If it is the state of another stream.
        """
        here, there = self.stream.identity(), state["identity"]
        if differences := [
            f"{name}={there.get(name)} there and {here.get(name)} here"
            for name in {**there, **here}
            if there.get(name) != here.get(name)
        ]:
            raise ValueError(
                f"the checkpoint belongs to another stream: {', '.join(differences)}; set them as they were, or "
                "ignore_data_skip=true to begin this stream at its beginning"
            )
        self.progress = {int(shard): list(reached) for shard, reached in state["progress"].items()}
        self.batches = state["batches"]


_NO_WORKERS = {"prefetch_factor": None, "multiprocessing_context": None}


class _Readers(IterableDataset):
    """The readers of a process, of which each worker becomes one."""

    def __init__(
        self, stream: ShardedStream, rank: int, world: int, progress: Mapping[int, list[int]], batches: int
    ) -> None:
        self.stream, self.rank, self.world, self.progress, self.batches = stream, rank, world, progress, batches

    def __iter__(self) -> Iterator[Placed]:
        worker, workers = this_worker()
        # Batches come from the workers in turn: the first to come is that of the worker whose turn it was.
        turn = (worker + self.batches) % workers
        reader = Reader(
            self.stream, rank=self.rank, world=self.world, worker=turn, workers=workers, progress=self.progress
        )
        return iter(reader)


class _PlacedCollator:
    """Makes a batch, and tells how far it reaches in each shard."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, placed: Sequence[Placed]) -> tuple[dict[str, Any], dict[int, list[int]]]:
        batch = self.collate([each.example for each in placed])
        return batch, {each.shard: each.reached for each in placed}


def check_alike(stream: ShardedStream) -> None:
    """Make sure that all processes can open the files of a stream and see the same ones.

    Raises:
        ValueError: If they differ; names the files.
        OSError: If one cannot be opened.
        RuntimeError: If that happened in another process.
    """
    files = together(stream.files)
    everywhere = gather((stream.identity(), files))
    for rank, (identity, seen) in enumerate(everywhere):
        others, first = everywhere[0]
        for name in sorted({**first, **seen}):
            here, there = (f"{each[name]} bytes" if name in each else "not there" for each in (seen, first))
            if here != there:
                raise ValueError(f"data file {name}: {there} in process 0, {here} in process {rank}")
        if identity != others:
            raise ValueError(f"process {rank} reads another stream than process 0: {identity} and {others}")


class StreamProgress(TrainerCallback):
    """Lets a Trainer's stream go on where it stood at a checkpoint."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the place that the checkpoint recorded to the loader.

        Raises:
            ValueError: If the checkpoint recorded none, or that of another stream.
        """
        loader, name = kwargs["train_dataloader"], type(self).__name__
        if not isinstance(loader, StreamLoader) or state.global_step == 0 or args.ignore_data_skip:
            return
        if name not in state.stateful_callbacks:
            raise ValueError(
                "the checkpoint does not say where its stream stood, since its run did not stream: set "
                "ignore_data_skip=true to begin the stream at its beginning"
            )
        loader.load_state_dict(state.stateful_callbacks[name])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count epochs over the whole run; a Trainer counts them from where a stream was resumed."""
        if isinstance(kwargs["train_dataloader"], StreamLoader):
            state.epoch = state.global_step / state.max_steps

    @classmethod
    def record(cls, state: TrainerState, loader: object) -> None:
        """Note in ``state`` how far ``loader`` has been taken, if it is that of a stream; in all processes together."""
        if isinstance(loader, StreamLoader):
            state.stateful_callbacks[cls.__name__] = loader.state_dict()


def reading_options(args: TrainingArguments) -> dict[str, Any]:
    """How a loader of a stream reads for a Trainer with these arguments.

    Raises:
        ValueError: If several processes are to see the same batches, as in tensor parallelism.
    """
    shared = getattr(args, "parallelism_config", None)
    if shared is not None and shared.non_data_parallel_size > 1:
        raise ValueError(
            "each process reads a stream for itself: leave out tensor, context and sequence parallelism, or streaming"
        )
    return {
        "rank": args.process_index,
        "world": args.world_size,
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "multiprocessing_context": args.dataloader_multiprocessing_context,
    }
