"""Training arguments for SQuAD: one routine for all pretrained models."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_fnl.tasks.workers import TextTrainingArguments


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
