"""Tiny models that become low-rank on the way, for tests in this process and in others."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_cases import PLAIN, tiny_examples
from training_cases import SIZES as BERT_SIZES
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_fnl import (
    FactorizationConfig,
    FactorizedBertConfig,
    FactorizedBertForPreTraining,
    FLAMBeTrainer,
    FLAMBeTrainingArguments,
    factorize_,
)

SIZES: dict[str, Any] = {"vocab_size": 31, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20, "n_positions": 8}
SWITCH = 3  # steps of the dense phase

DEFAULTS: dict[str, Any] = {**PLAIN, "lr_scheduler_type": "linear"}

# As Kamalakara et al. 2022 do it: the queries', keys' and values' matrix, and the feed-forward ones.
GPT2_LAYERS = FactorizationConfig(rank=5, include=["*.c_attn", "*.c_fc", "*.mlp.c_proj"])
factorize_gpt2 = functools.partial(factorize_, config=GPT2_LAYERS)


def factorize_bert(model: FactorizedBertForPreTraining) -> None:
    """Cuts heads, so that weights change their shape, and factorizes layers and the tied embedding."""
    model.factorize_(qk_rank=5, ov_rank=6, ffn_rank=7, embedding_rank=11)


def tiny_gpt2(*, dropout: float = 0.2, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**SIZES, **rates, initializer_range=0.2, bos_token_id=0, eos_token_id=0))


def tiny_bert(*, dropout: float = 0.2, seed: int = 0) -> FactorizedBertForPreTraining:
    """One of our own models, before it has any factors."""
    torch.manual_seed(seed)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return FactorizedBertForPreTraining(FactorizedBertConfig(**BERT_SIZES, **rates))


def tiny_texts(count: int = 48, length: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(SIZES["vocab_size"], (length,), generator=generator) for _ in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def low_rank_trainer(
    output_dir: str | Path, model: PreTrainedModel | None = None, *, factorize: Any = factorize_gpt2, **options: Any
) -> FLAMBeTrainer:
    """A trainer that factorizes the tiny GPT-2, or another model, after ``SWITCH`` steps."""
    model = model or tiny_gpt2()
    data = tiny_texts() if isinstance(model, GPT2LMHeadModel) else tiny_examples()
    options = {**DEFAULTS, "dense_steps": SWITCH, "frobenius_decay": ["linear"], **options}
    args = FLAMBeTrainingArguments(output_dir=str(output_dir), **options)
    return FLAMBeTrainer(model, args, factorize=factorize, train_dataset=data, eval_dataset=data[:8])
