"""Training on sentence pairs: options, the smoothed loss over target tokens, batches by length."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datasets
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.tasks.length_batches import LengthBatchSampler, lengths_of
from hf_fnl.tasks.metrics.tokens import token_metrics, token_sums
from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import EpochCallback
from hf_fnl.training.trainer import FLAMBeTrainer


@dataclass
class TranslationArguments(FLAMBeTrainingArguments):
    """Training arguments with batches by tokens; ``per_device_train_batch_size`` has no effect.

    Raises:
        ValueError: As in :class:`FLAMBeTrainingArguments`, and if ``max_tokens`` or the smoothing is out of range.
    """

    optim: str = field(
        default="adamw_torch", metadata={"help": "flambe, lamb, or any optimizer of Transformers (sgd, ...)."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "Any of Transformers' schedules."})
    warmup_steps: float = field(default=200, metadata={"help": "Steps of linear warm-up."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Passes over the training pairs."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Spread over all entries of the vocabulary."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Sentences of a batch in evaluation."})
    max_tokens: int = field(
        default=2048,
        metadata={"help": "Tokens of a batch on each device at most: sentences x longest one, padding included."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.auto_find_batch_size:
            raise ValueError("auto_find_batch_size changes no batches of max_tokens: lower that instead")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor must be in [0, 1), got {self.label_smoothing_factor}")


def smoothed_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    r"""Return the cross-entropy with the targets ``(1 - eps) onehot + eps / vocab_size`` (Szegedy et al. 2016).

    Args:
        logits: ``(..., vocab_size)``, of any floating type; the loss is computed in float32.
        labels: ``(...)``, -100 where nothing is predicted.
        smoothing: ``eps``, spread over all entries of the vocabulary, as in fairseq.
        num_items_in_batch: What the sum is divided by: labels of all accumulated batches and processes. Default: those
            given here.
    """
    total = F.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=smoothing,
        reduction="sum",
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORE_INDEX).sum()
    return total / num_items_in_batch


class TranslationTrainer(FLAMBeTrainer):
    """A Trainer whose training batches have like numbers of tokens and whose loss is the mean over target tokens.

    The same run, at equal tokens of a step, however the step is spread over accumulated batches and processes; any
    encoder-decoder model of Transformers will do. Evaluation reports loss and perplexity per target token, without
    smoothing, and the share of tokens predicted right.
    """

    args: TranslationArguments

    def __init__(
        self,
        model: nn.Module,
        args: TranslationArguments,
        *,
        train_dataset: datasets.Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            compute_loss_func=self._loss,
            compute_metrics=token_metrics,
            preprocess_logits_for_metrics=token_sums,
            **kwargs,
        )
        if train_dataset is not None:
            self._batches = LengthBatchSampler(
                lengths_of(train_dataset),
                max_tokens=args.max_tokens,
                seed=args.seed if args.data_seed is None else args.data_seed,
                num_processes=args.world_size,
            )
            self.add_callback(EpochCallback(self._batches))

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        return smoothed_cross_entropy(outputs["logits"], labels, smoothing, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, without the cache that a decoder fills when it is not given the labels."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Batches under ``args.max_tokens``, dealt out to the processes in turn."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the sentences of a step, on average over an epoch."""
        return round(len(self.train_dataset) / len(self._batches) * args.world_size * args.gradient_accumulation_steps)
