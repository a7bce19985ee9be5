"""A small pretraining problem whose parameters outweigh what engines send beside them; plan and count look at it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining
from hf_fnl.planning import Plan, Setup, plan

STEPS, LENGTH, BATCH = 5, 13, 2
_SCALE = int(os.environ.get("TRAFFIC_SCALE", "1"))  # of all that makes messages large
SIZES: dict[str, Any] = {
    "vocab_size": 301 * _SCALE,
    "hidden_size": 60 * _SCALE,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 112 * _SCALE,
    "max_position_embeddings": 16,
    "ov_rank": 11 * _SCALE,
    "ffn_rank": 26 * _SCALE,
}


def traffic_model(device: str = "cpu", hidden_size: int | str = SIZES["hidden_size"]) -> FactorizedBertForPreTraining:
    """A BERT with three heads, which two processes cannot share evenly."""
    torch.manual_seed(0)
    with torch.device(device):
        return FactorizedBertForPreTraining(FactorizedBertConfig(**SIZES | {"hidden_size": int(hidden_size)}))


def traffic_examples(length: int) -> list[dict[str, Tensor]]:
    """Examples with two labels each."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, SIZES["vocab_size"], (8 * STEPS * BATCH, length), generator=generator)
    labels = torch.full_like(rows, -100)
    labels[:, :2] = rows[:, :2]
    return [
        {"input_ids": row, "labels": label, "next_sentence_label": torch.tensor(number % 2)}
        for number, (row, label) in enumerate(zip(rows, labels, strict=True))
    ]


def planned(case: str) -> Plan:
    """The plan of ``ENGINE/ACCUMULATION/DTYPE/OPTIMIZER``, or with ``/HIDDEN_SIZE`` behind, on two processes."""
    engine, accumulation, dtype, optimizer, *hidden_size = case.split("/")
    setup = Setup(
        engine=engine,
        gpus=2,
        accumulation=int(accumulation),
        dtype=dtype,
        optimizer=optimizer,
        batch_size=BATCH,
        sequence_length=LENGTH,
        labelled_share=2 / LENGTH,
    )
    return plan(lambda: traffic_model("meta", *hidden_size), setup)
