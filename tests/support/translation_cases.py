"""Sentence pairs, and a tiny translation problem that tests and their worker processes share."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from training_cases import QUIET
from transformers import DataCollatorForSeq2Seq, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from hf_fnl.tasks.phrases import embedded_phrases
from hf_fnl.tasks.tokenization import train_joint_bpe
from hf_fnl.tasks.translation import encode_pairs
from hf_fnl.tasks.translation_training import TranslationArguments, TranslationTrainer

PAIRS = [("Guten Tag .", "Good day ."), ("Wie geht es dir ?", "How are you ?"), ("Ja", "Yes")]


def phrases(count: int = 61) -> datasets.Dataset:
    """The first embedded training phrases."""
    return datasets.Dataset.from_dict({side: texts[:count] for side, texts in embedded_phrases("train").items()})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A joint vocabulary of 150 entries for the first phrases and ``PAIRS``."""
    pairs = phrases()
    return train_joint_bpe([*pairs["source"], *pairs["target"], *chain(*PAIRS)], vocab_size=150)


def tiny_marian(tokenizer: PreTrainedTokenizerFast, *, dropout: float = 0.0, positions: int = 128) -> MarianMTModel:
    """A stock Marian with weights large enough that gradients show within a few steps."""
    torch.manual_seed(0)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 3, "decoder_attention_heads": 3}
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=24,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_position_embeddings=positions,
        dropout=dropout,
        init_std=0.2,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_id=eos,
        forced_eos_token_id=eos,
        **layers,
    )
    return MarianMTModel(config)


def tiny_trainer(output_dir: str | Path, *, dropout: float = 0.0, **options: Any) -> TranslationTrainer:
    """A trainer over the tiny problem, with clipping off and everything written to ``output_dir``."""
    defaults = {
        **QUIET,
        "learning_rate": 0.02,
        "max_tokens": 600,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }
    tokenizer = tiny_tokenizer()
    model = tiny_marian(tokenizer, dropout=dropout)
    return TranslationTrainer(
        model,
        TranslationArguments(output_dir=str(output_dir), **{**defaults, **options}),
        train_dataset=encode_pairs(phrases(), tokenizer, longest=128),
        eval_dataset=encode_pairs(phrases(23), tokenizer, longest=128),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
    )
