"""Training arguments for data whose examples do not depend on which process prepares them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from hf_fnl.training.arguments import FLAMBeTrainingArguments

WORKERS = 2  # one makes two to three times as many examples of 128 tokens as a GPU of 2024 trains BERT-base on


@dataclass
class TextTrainingArguments(FLAMBeTrainingArguments):
    """:class:`FLAMBeTrainingArguments` under which data is prepared beside the training wherever a GPU would wait.

    Batches of a stored data set are the same for any number of workers. A stream is read in another order by another
    number of them.
    """

    dataloader_num_workers: int = field(
        default=-1,
        metadata={
            "help": "Processes that prepare data beside each training process; 0: it prepares them itself. Default: "
            f"{WORKERS} with a CUDA GPU, as far as there are cores for them, and 0 without."
        },
    )

    def __post_init__(self) -> None:
        if self.dataloader_num_workers < 0:
            self.dataloader_num_workers = default_workers(use_cpu=self.use_cpu)
        super().__post_init__()


def default_workers(*, use_cpu: bool) -> int:
    """How many processes prepare data beside a training process."""
    if use_cpu or not torch.cuda.is_available():
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(WORKERS, max(0, cores - 1))
