"""A tiny pretraining problem that the trainer's tests and their worker processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, Trainer

from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining, FLAMBeTrainer, FLAMBeTrainingArguments

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    # Large enough that decay and gradients show within a few steps.
    "initializer_range": 0.2,
}
RANKS = {"qk_rank": 5, "ov_rank": 6, "ffn_rank": 7, "embedding_rank": 11}


def tiny_model(*, dropout: float = 0.0, stock: bool = False, seed: int = 0) -> torch.nn.Module:
    """A factorized BERT with its pretraining heads, or the stock one."""
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if stock:
        return BertForPreTraining(BertConfig(**SIZES, **rates))
    return FactorizedBertForPreTraining(FactorizedBertConfig(**SIZES, **RANKS, **rates))


def tiny_examples(count: int = 48, length: int = 13) -> list[dict[str, Tensor]]:
    """Examples with different numbers of labels, so that means over batches and over labels differ."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        input_ids = torch.randint(5, SIZES["vocab_size"], (length,), generator=generator)
        labels = torch.full_like(input_ids, -100)
        labels[: 1 + index % 4] = input_ids[: 1 + index % 4]
        label = torch.tensor(index % 3 % 2)
        examples.append({"input_ids": input_ids, "labels": labels, "next_sentence_label": label})
    return examples


QUIET: dict[str, Any] = {
    "max_steps": 6,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
PLAIN: dict[str, Any] = {
    **QUIET,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 8,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
}


def tiny_trainer(output_dir: str | Path, model: torch.nn.Module | None = None, **options: Any) -> FLAMBeTrainer:
    """A trainer over the tiny problem, with clipping off and everything written to ``output_dir``."""
    args = FLAMBeTrainingArguments(output_dir=str(output_dir), **{**PLAIN, **options})
    return FLAMBeTrainer(model if model is not None else tiny_model(), args, train_dataset=tiny_examples())


def losses(trainer: Trainer) -> list[float]:
    """The training losses that a trainer logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
