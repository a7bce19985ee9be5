"""A stream of numbered examples for the tiny BERT of the trainer's tests."""

from __future__ import annotations

from typing import Any

import datasets
import torch

COUNT, SHARDS = 23, 5

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


def stream(count: int = COUNT, shards: int = SHARDS) -> datasets.IterableDataset:
    """Examples whose first token, less 5, is their number; their lengths and numbers of labels differ."""
    numbers = datasets.Dataset.from_dict({"number": range(count)}).to_iterable_dataset(num_shards=shards)
    return numbers.map(_example, remove_columns=["number"])


def _example(row: dict[str, int]) -> dict[str, Any]:
    number = row["number"]
    input_ids = torch.tensor([5 + number, *range(20, 25 + number % 7)])
    labels = torch.full_like(input_ids, -100)
    labels[1 : 2 + number % 4] = input_ids[1 : 2 + number % 4]
    return {"input_ids": input_ids, "labels": labels, "next_sentence_label": torch.tensor(number % 2)}


class Recorder:
    """Makes a batch as wide as its longest example, and keeps the numbers of the examples."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.batches.append([int(example["input_ids"][0]) - 5 for example in examples])
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch = {"attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}
        for name, value in {"input_ids": 0, "labels": -100}.items():
            rows = [example[name] for example in examples]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        return {**batch, "next_sentence_label": torch.stack([each["next_sentence_label"] for each in examples])}
