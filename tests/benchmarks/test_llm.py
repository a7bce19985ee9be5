"""The peers of the benchmark of language models are what they are called, and its table is of its rows."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.llm import cut, decoder_layers, speed_table, table
from benchmarks.peers import sequential, svd
from hf_fnl.math.truncation import Moments, truncate_linear

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.2, **SIZES)).eval()


@pytest.mark.parametrize("method", svd.METHODS)
def test_a_peer_cuts_every_layer_to_its_share(model: LlamaForCausalLM, method: str) -> None:
    layers, ids = decoder_layers(model), torch.randint(40, (20, 19))
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    ranks = svd.cut_(layers, model, ids.split(2), 0.5, method)
    for name, layer in layers.items():
        m, n = layer.weight.shape
        assert ranks[name] == int(0.5 * m * n / (m + n)) == torch.linalg.matrix_rank(layer.weight, rtol=1e-4)
        samples = inputs[name].flatten(0, 1)
        if method == "asvd":
            scale = samples.abs().mean(0).sqrt()
            expected = truncate_linear(before[name] * scale, None, ranks[name], identity(n))
            assert_close(layer.weight, (expected[0] @ expected[1].T) / scale, rtol=1e-3, atol=1e-4)
        else:
            moments = Moments.of(samples) if method == "whitening" else identity(n)
            U, V, _ = truncate_linear(before[name], None, ranks[name], moments)
            assert_close(layer.weight, U @ V.T, rtol=1e-2, atol=1e-3)


def identity(n: int) -> Moments:
    return Moments(torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64))


def test_ours_keeps_to_the_share(model: LlamaForCausalLM) -> None:
    found = cut(model, 0.7, "ours", torch.randint(40, (4, 512)).flatten())
    assert 0.55 < found["layer_ratio"] <= 0.7  # ranks are multiples of 8


def test_the_table_compares_with_whitening_at_the_same_share() -> None:
    def row(method: str, share: float, value: float) -> dict:
        losses = {name: {"perplexity": value} for name in ("wikitext2", "wikipedia")}
        return {"method": method, "share": share, "layer_ratio": share, **losses}

    lines = table([row("dense", 1.0, 10.0), row("whitening", 0.8, 1000.0), row("ours", 0.8, 100.0)]).splitlines()
    assert [line.split("|")[5].strip() for line in lines[2:]] == ["", "1.00", "0.50"]


def test_the_table_of_speeds_has_each_model_twice() -> None:
    row = {"model": "dense", "int8": False, "perplexity": 21.0, "bytes": 2**20, "peak_memory": 2**21}
    row["tokens_per_second"] = {"1": 30.0, "16": 200.0}
    lines = speed_table([row, row | {"int8": True, "perplexity": 22.5}]).splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]] == [
        ["dense", "21.00", "30.0", "200.0", "1", "2"],
        ["dense, int8", "22.50", "30.0", "200.0", "1", "2"],
    ]


def test_the_anchored_fit_is_the_least_squares_of_its_rank() -> None:
    torch.manual_seed(0)
    W, z = torch.randn(5, 6, dtype=torch.float64), torch.randn(300, 6, dtype=torch.float64)
    x = z @ torch.randn(6, 6, dtype=torch.float64) + torch.randn(300, 6, dtype=torch.float64)
    y = z @ W.mT
    found = sequential.fitted(W, [z[:100], z[100:]], [x[:100], x[100:]], 2)
    assert torch.linalg.matrix_rank(found, rtol=1e-6) == 2
    U = torch.randn(5, 2, dtype=torch.float64)
    for _ in range(500):  # alternating least squares, from a random start
        V = torch.linalg.lstsq(x, torch.linalg.lstsq(U, y.mT).solution.mT).solution
        U = torch.linalg.lstsq(x @ V, y).solution.mT
    least, ours = ((y - x @ B.mT).square().sum() for B in (U @ V.mT, found))
    assert_close(ours, least, rtol=1e-6, atol=0)


def test_outputs_of_the_anchored_peer_are_nearer_than_without_the_anchor() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, initializer_range=0.2, **{**SIZES, "num_hidden_layers": 3})
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(40, (20, 19))
    wanted, errors = model.model(ids).last_hidden_state, {}
    for method in sequential.METHODS:
        small = copy.deepcopy(model)
        ranks = sequential.cut_(decoder_layers(small), small, ids.split(2), 0.5, method)
        for name, layer in decoder_layers(small).items():
            assert ranks[name] == torch.linalg.matrix_rank(layer.weight, rtol=1e-4)
        errors[method] = (small.model(ids).last_hidden_state - wanted).square().mean()
    assert errors["anchored"] < errors["sequential"]
