"""A stream of numbered records, and processes that read it, all in one process of the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from hf_fnl.training.stream_loader import StreamLoader
from hf_fnl.training.streaming import ShardedStream


class Records(ShardedStream):
    """Records ``(shard, epoch, index)``, ``sizes[shard]`` of them in each shard."""

    start = (0,)

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        super().__init__()
        self.sizes, self.num_shards, self.seed = sizes, len(sizes), seed

    def read(self, shard, epoch, place):
        for index in range(place[0], self.sizes[shard]):
            yield {"record": torch.tensor([shard, epoch, index])}, (index + 1,)


def stack(examples: list[dict]) -> dict[str, Any]:
    return {"records": [tuple(example["record"].tolist()) for example in examples]}


class Processes:
    """The loaders of ``world`` processes, of which each draws as many batches as the others.

    Args:
        stream: The stream.
        world: Number of processes.
        workers: Data loader workers of each.
        state: What :meth:`state` returned, of however many processes.
    """

    def __init__(
        self,
        stream: ShardedStream,
        world: int = 1,
        workers: int = 0,
        state: dict | None = None,
        batch_size: int = 3,
        collate=stack,
    ) -> None:
        options = {"batch_size": batch_size, "num_workers": workers, "world": world}
        self.loaders = [StreamLoader(stream, collate, rank=rank, **options) for rank in range(world)]
        for loader in self.loaders if state else ():
            loader.load_state_dict(state)
        self.iterators = [iter(loader) for loader in self.loaders]

    def draw(self, count: int) -> list[list[Any]]:
        """The next batches, a list of each process."""
        return [[next(iterator) for _ in range(count)] for iterator in self.iterators]

    def state(self) -> dict[str, Any]:
        """What the processes would write into a checkpoint."""
        states = [loader.state_dict() for loader in self.loaders]
        progress = [state["progress"] for state in states]
        assert sum(map(len, progress)) == len({shard for part in progress for shard in part})
        merged = {**states[0], "progress": {shard: place for part in progress for shard, place in part.items()}}
        return json.loads(json.dumps(merged))


def flat(drawn: list[list[dict]]) -> list[tuple[int, int, int]]:
    """The records of batches that :meth:`Processes.draw` returned."""
    return [record for batches in drawn for batch in batches for record in batch["records"]]


class RecordExamples(Records):
    """Records as examples for the tiny BERT of the trainer's tests, of different lengths and numbers of labels."""

    def read(self, shard, epoch, place):
        for index in range(place[0], self.sizes[shard]):
            length = 5 + (index + 2 * shard) % 7
            input_ids = torch.tensor([5 + shard, 5 + epoch, 5 + index, *range(20, 20 + length)])
            labels = torch.full_like(input_ids, -100)
            labels[3 : 4 + index % 4] = input_ids[3 : 4 + index % 4]
            label = torch.tensor((index + shard) % 2)
            yield {"input_ids": input_ids, "labels": labels, "next_sentence_label": label}, (index + 1,)


def pad(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of examples, as wide as the longest."""
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch = {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
    for name, value in {"input_ids": 0, "labels": -100}.items():
        rows = [example[name] for example in examples]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
    return {**batch, "next_sentence_label": torch.stack([example["next_sentence_label"] for example in examples])}


class Recorder:
    """Collates as :func:`pad` does, and keeps what it was given: where nothing reads ahead, what was trained on."""

    def __init__(self) -> None:
        self.batches: list[list[dict]] = []

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        self.batches.append(list(examples))
        return pad(examples)

    @property
    def records(self) -> list[list[tuple[int, int, int]]]:
        """The records of each batch."""
        return [[tuple((each["input_ids"][:3] - 5).tolist()) for each in batch] for batch in self.batches]


# Sizes of shards to be evaluated on: even, one process long dry, one without a shard, one with records.
EVALUATED = ([3, 3], [1, 17], [8], [0, 2], [7, 1, 4, 5, 3])

TRAINED: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
