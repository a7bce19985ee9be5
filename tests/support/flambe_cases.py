"""Models with products of every form, in groups with rates of their own, and gradients for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import CASES as STOCK
from attention_cases import rotary_attention
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining

from hf_fnl.attention import Product, find_products, register_attention
from hf_fnl.layers import FactorizedEmbedding, FactorizedLinear
from hf_fnl.optim import parameter_groups


def stock_bert() -> nn.Module:
    config = BertConfig(
        vocab_size=13,
        hidden_size=15,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=7,
        max_position_embeddings=11,
        initializer_range=0.5,
    )
    return BertForPreTraining(config)


def factorized() -> nn.Module:
    """Products of two and of three factors, and a dense layer."""
    return nn.ModuleDict(
        {
            "embedding": FactorizedEmbedding(13, 7, 2),
            "shallow": FactorizedLinear(7, 5, 3),
            "deep": FactorizedLinear(5, 11, 3, deep=True),
            "overcomplete": FactorizedLinear(2, 3, 5, deep=True, overcomplete=True),
            "dense": nn.Linear(7, 5),
        }
    )


MODELS = {"stock-bert": stock_bert, "factorized": factorized, **{name: case.build for name, case in STOCK.items()}}
CASES = [
    pytest.param("stock-bert", ["ov"], id="stock-bert-ov"),
    pytest.param("stock-bert", ["ov", "qk"], id="stock-bert-ov-qk"),
    pytest.param("roberta", ["ov"], id="roberta-ov"),
    pytest.param("llama", ["ov"], id="llama-ov-of-groups"),
    pytest.param("llama", ["ov", "qk"], id="llama-ov-qk-of-groups"),
    pytest.param("gpt2", ["ov"], id="gpt2-ov-in-a-part"),
    pytest.param("gpt2", ["qk"], id="gpt2-qk-in-a-part"),
    pytest.param("gpt2", ["ov", "qk"], id="gpt2-ov-qk-in-all"),
    pytest.param("phi3", ["ov"], id="phi3-ov-of-groups-in-a-part"),
    pytest.param("factorized", ["linear", "embedding"], id="factorized"),
]


def build(model: str, kinds: list[str], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Product]]:
    torch.manual_seed(0)
    built = MODELS[model]().to(dtype)
    with register_attention(rotary_attention):
        return built, find_products(built, kinds)


def groups_of(model: nn.Module, products: list[Product], weight_decay: float = 0.3) -> list[dict[str, Any]]:
    groups = parameter_groups(model, weight_decay=weight_decay, products=products, frobenius_decay=2 * weight_decay)
    return [{**group, "lr": lr} for group, lr in zip(groups, (0.1, 0.02, 0.05), strict=False)]


def set_gradients(model: nn.Module, seed: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return {name: parameter.grad for name, parameter in model.named_parameters()}
