"""Tables of matrices: every weight once, figures equal to those of the matrix itself."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from training_cases import tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3Model,
)
from transformers.pytorch_utils import Conv1D

from hf_fnl import FactorizationConfig, FactorizedLinear, factorize_
from hf_fnl.attention import find_products
from hf_fnl.optim.diagnostics import diagnose, forward_flops
from hf_fnl.report import inspect_model, read_energies
from hf_fnl.vision.models import CifarResNetConfig, CifarResNetForImageClassification, inner_convolutions


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=11, n_embd=20, n_layer=2, n_head=4))


def grouped_llama() -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, tie_word_embeddings=False, **sizes, **heads))


def after_surgery() -> nn.Module:
    """Linear layers and the tied table as products, plain positions beside them."""
    model = gpt2()
    factorize_(model, FactorizationConfig(rank=3, kinds=("linear", "embedding"), exclude=("*wpe",)))
    return model


def normalized_queries_and_keys() -> nn.Module:
    """Values and outputs are the only product of the attention."""
    sizes = {"hidden_size": 8, "head_dim": 4, "num_key_value_heads": 2, "intermediate_size": 6, "pad_token_id": 0}
    return Qwen3Model(Qwen3Config(vocab_size=13, num_hidden_layers=1, num_attention_heads=2, **sizes))


def fused_with_values_in_no_product() -> nn.Module:
    """The matrix of queries, keys and values is only in part of a product, for the output is factorized."""
    model = gpt2()
    factorize_(model, FactorizationConfig(rank=3, include=("*attn.c_proj",)))
    return model


class OddAttention(nn.Module):
    """Of a layout that no adapter knows."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(7, 21), nn.Linear(21, 7)


MODELS = {
    "factorized-bert": tiny_model,
    "stock-bert": lambda: tiny_model(stock=True),
    "fused": gpt2,
    "grouped": grouped_llama,
    "surgery": after_surgery,
    "one-product": normalized_queries_and_keys,
    "part-of-a-matrix": fused_with_values_in_no_product,
    "unknown-attention": lambda: nn.Sequential(OddAttention(), nn.Embedding(5, 7)),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_weight_is_counted_once(build):
    model = build()
    rows = inspect_model(model)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert sum(row.flops for row in rows) == forward_flops(model)["factorized"]
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("build", [tiny_model, grouped_llama, after_surgery])
def test_products_have_the_figures_of_the_diagnostics(build):
    model = build()
    rows = {row.name: row for row in inspect_model(model)}
    kinds = ["ov"] if build is grouped_llama else None  # whose queries and keys are no product
    for name, figures in diagnose(model, find_products(model, kinds)).items():
        for figure in ("frobenius_norm", "nuclear_norm", "effective_rank"):
            assert getattr(rows[name], figure) == pytest.approx(figures[figure], rel=1e-4), (name, figure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_matrices_have_the_figures_of_their_singular_values(dtype):
    layers = {
        "tall": nn.Linear(5, 13),
        "wide": nn.Linear(13, 5),
        "table": nn.Embedding(11, 4),
        "patch": nn.Conv2d(2, 7, 3),
        "transposed": Conv1D(6, 10),
    }
    model = nn.ModuleDict(layers).to(dtype)
    for row in inspect_model(model):
        weight = layers[row.name].weight.detach().double().flatten(1)
        weight = weight.mT if row.name == "transposed" else weight
        s = torch.linalg.svdvals(weight)
        kept = s.square().cumsum(0) / s.square().sum()
        assert (row.kind, row.shape, row.rank) == ("dense", tuple(weight.shape), min(weight.shape))
        assert row.frobenius_norm == pytest.approx(float(s.norm()))
        assert row.nuclear_norm == pytest.approx(float(s.sum()))
        assert row.effective_rank == pytest.approx(float(s.sum() / s[0]))
        assert kept[row.rank_90 - 1] >= 0.9 > (kept[row.rank_90 - 2] if row.rank_90 > 1 else 0)


def test_rank_for_90_percent_serves_all_heads_together():
    model = tiny_model()
    product = find_products(model, ("ov",))[0]
    s = torch.linalg.svdvals(product.matrix(model).detach().double())
    kept = [float(s[:, :rank].square().sum() / s.square().sum()) for rank in range(s.shape[-1] + 1)]
    (row,) = (row for row in inspect_model(model) if row.name == product.name)
    assert kept[row.rank_90] >= 0.9 > kept[row.rank_90 - 1]


def test_a_zero_matrix_has_no_rank():
    layer = nn.Linear(3, 5)
    nn.init.zeros_(layer.weight)
    (row,) = inspect_model(nn.Sequential(layer))
    assert (row.frobenius_norm, row.effective_rank, row.rank_90) == (0, 0, 0)


def test_energies_are_those_of_the_record(tmp_path):
    model = nn.Sequential(FactorizedLinear(7, 5, 2), FactorizedLinear(5, 3, 2))
    assert read_energies(tmp_path) == {}
    layers = [{"name": "0", "energy": 0.75}, {"name": "1", "energy": None}]
    (tmp_path / "factorization.json").write_text(json.dumps({"layers": layers}))
    energies = read_energies(tmp_path)
    assert [row.figures(energies.get(row.name))["energy"] for row in inspect_model(model)] == [0.75, None]


@pytest.mark.parametrize("text", ["{", '{"layers": [{"energy": 0.5}]}', '{"layers": [1]}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / "factorization.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'factorization.json'} is damaged"):
        read_energies(tmp_path)


def _with_nan() -> nn.Module:
    model = tiny_model()
    model.get_parameter("bert.encoder.layer.1.attention.self.key.weight").data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_with_nan, "weights of bert.encoder.layer.1.attention.qk hold NaN or Inf"),
        (lambda: nn.Sequential(nn.Linear(3, 2, device="meta")), "0 is on the meta device"),
        (lambda: nn.LayerNorm(3), "LayerNorm holds no product, linear layer"),
    ],
    ids=["nan", "meta", "nothing"],
)
def test_what_cannot_be_inspected(build, message):
    with pytest.raises(ValueError, match=message):
        inspect_model(build())


@pytest.mark.parametrize("scheme", ["spatial", "channel", "tt", "tucker"])
def test_kernels_are_matrices_each_counted_once(scheme):
    if is_tensor := scheme in ("tt", "tucker"):
        pytest.importorskip("tltorch")
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=5, image_size=9, num_labels=7))
    include = inner_convolutions(model)
    factorize_(model, FactorizationConfig(kinds=("conv",), include=include, conv_scheme=scheme, rank=3))
    rows = {row.name: row for row in inspect_model(model)}
    kinds = [row.kind for row in rows.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"dense": 2, "tensor" if is_tensor else "conv": 6}
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    for name, figures in diagnose(model, find_products(model)).items():
        assert rows[name].nuclear_norm == pytest.approx(figures["nuclear_norm"], rel=1e-4)
        assert rows[name].rank == 3
        if is_tensor:
            matrix = model.get_submodule(name).dense_weight().detach().double().flatten(1)
            assert rows[name].shape == tuple(matrix.shape)
            assert rows[name].frobenius_norm == pytest.approx(float(matrix.norm()))
