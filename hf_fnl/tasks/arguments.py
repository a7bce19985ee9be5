"""Training arguments of the tasks on text: workers that prepare data, and BERT's routine of fine-tuning on SQuAD."""

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
    """Return how many processes prepare data beside a training process."""
    if use_cpu or not torch.cuda.is_available():
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(WORKERS, max(0, cores - 1))


@dataclass
class SquadTrainingArguments(TextTrainingArguments):
    """:class:`TextTrainingArguments` whose defaults are BERT's own routine, whatever optimizer pretrained the model.

    Devlin et al. 2019's ``run_squad.py``: Adam with decoupled decay, 3e-5 in batches of 12, two epochs, a tenth of
    them warm-up, then linear to zero. Khodak et al. 2021 (App. D) fine-tune all their models alike; what LAMB or FLAMBe
    gave is compared by this, not by how either fine-tunes.
    """

    optim: str = field(
        default="adamw_torch", metadata={"help": "flambe, lamb, or any optimizer of Transformers (adamw_torch, ...)."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Highest learning rate."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the questions."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or a share of all if below 1."})
    per_device_train_batch_size: int = field(default=12, metadata={"help": "Windows of a batch on each device."})
