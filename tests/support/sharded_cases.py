"""A small BERT that two processes cannot divide evenly, its optimizer, and the cases of ``test_sharded_engines``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from hf_fnl.attention import Product, find_products
from hf_fnl.layers import FactorizedLinear
from hf_fnl.optim import FLAMBe, parameter_groups

LEARNING_RATE = 4e-3


def build(case: Mapping[str, Any]) -> BertForMaskedLM:
    """Three heads, feed-forward matrices as products of two and of three factors, tied embeddings, no dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=33,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    model = BertForMaskedLM(config)
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense = FactorizedLinear.from_dense(layer.intermediate.dense, 12)
        layer.output.dense = FactorizedLinear.from_dense(layer.output.dense, 12, deep=True)
    return model.to(getattr(torch, case.get("dtype", "float32")))


def products_of(model: BertForMaskedLM) -> list[Product]:
    return find_products(model, ["ov", "qk", "linear"])


def groups_of(model: BertForMaskedLM, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups with decay and without; with ``split``, the last factors of products are in a group of their own."""
    products = products_of(model)
    groups = parameter_groups(model, weight_decay=0.1, products=products)
    if case.get("split"):
        right = {product.places[-1].name for product in products}
        factors = groups.pop()["params"]
        for chosen in (True, False):
            groups.append({"params": [pair for pair in factors if (pair[0] in right) is chosen], "weight_decay": 0.1})
    return [{**group, "lr": LEARNING_RATE} for group in groups]


def optimizer_for(model: BertForMaskedLM, case: Mapping[str, Any]) -> FLAMBe:
    return FLAMBe(groups_of(model, case), products=products_of(model))


def batches(case: Mapping[str, Any]) -> list[torch.Tensor]:
    """Five batches of 12 sequences."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 97, (12, 16), generator=generator) for _ in range(5)]
