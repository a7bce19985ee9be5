"""Heads of any attention are cut in place: outputs, gradients, generation, records, adapters, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import stock_cases
import torch
import transformers as T
from stock_cases import FAMILIES, HEADS, HIDDEN, WIDTH, batch, logits
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_fnl import FactorizationConfig, factorize_, find_products, merge_, restore_
from hf_fnl.layers import FactorizedLinear, HeadProjection

each_model = pytest.mark.parametrize("name", ["llama-biases", "qwen3", "phi3", "gpt2", "bert", "t5"])


def build(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    return stock_cases.build(name, dtype)


def cut(name: str, model: PreTrainedModel, calibration: Any = None, **options: Any) -> Any:
    options = {"kinds": FAMILIES[name].kinds, **options}
    return factorize_(model, FactorizationConfig(**options), calibration=calibration)


def narrow_layers(model: nn.Module) -> dict[str, HeadProjection]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, HeadProjection)}


@each_model
def test_heads_of_full_rank_compute_what_they_did(name):
    # The ridge of the metric of data moves what is cut by 1e-5 of it.
    for calibrated, tolerance in ((False, 1e-8), (True, 1e-3)):
        model = build(name)
        before = logits(model)
        done = cut(name, model, batch(model, 40) if calibrated else None, rank_scale=1.0)
        assert {replacement.kind for replacement in done.replacements} == set(FAMILIES[name].kinds)
        assert_close(logits(model), before, rtol=tolerance, atol=tolerance)


@each_model
@torch.no_grad()
def test_a_product_is_the_nearest_of_its_rank(name):
    """Of each group of heads that share a key or value; compared where biases do not come into it."""
    model = build(name)
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.zeros_(parameter)
    dense = copy.deepcopy(model)
    done = {each.name: each for each in cut(name, model, rank=2).replacements}
    products = {product.name: product for product in find_products(model, FAMILIES[name].kinds)}
    assert products.keys() == done.keys()
    for product in find_products(dense, FAMILIES[name].kinds):
        left, right = product.factors(dense)
        full, shared = (left, right) if left.shape[:-2] != right.shape[:-2] and left.shape[1] > 1 else (right, left)
        full, shared = (x if x.ndim == 4 else x.unsqueeze(1) for x in (full, shared))
        stacked = full.flatten(1, 2) @ shared.squeeze(1).mT
        energies = torch.linalg.svdvals(stacked).square()
        lost = (product.matrix(dense) - products[product.name].matrix(model)).square().sum()
        assert_close(lost, energies[..., 2:].sum())
        assert_close(done[product.name].energy, float(energies[..., :2].sum() / energies.sum()))


@each_model
def test_gradients_are_those_of_the_merged_model(name):
    model = build(name)
    cut(name, model, rank=2)
    merged = copy.deepcopy(model)
    merge_(merged)
    for each in (model, merged):
        each(**batch(model)).logits.square().sum().backward()
    for key, layer in narrow_layers(model).items():
        padded = copy.deepcopy(layer)
        padded.weight.data = layer.weight.grad
        expected = merged.get_submodule(key).weight.grad
        inside = padded.to_dense().weight != 0  # where heads are, and not what fills them up
        assert_close(padded.to_dense().weight[inside], expected[inside])


def test_layers_and_heads_are_cut_in_one_go_and_after_each_other():
    model, other = build("llama"), build("llama")
    data = batch(model, 40)
    done = cut("llama", model, data, kinds=("linear", "ov"), rank=2)
    assert not {layer for layer in done.skipped if "v_proj" in layer or "o_proj" in layer}
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, FactorizedLinear)
    assert isinstance(attention.o_proj, HeadProjection)
    cut("llama", other, kinds=("ov",), rank=2)
    done = cut("llama", other, kinds=("linear",), rank=2)
    assert done.skipped["model.layers.0.self_attn.v_proj"] == "its heads are cut"
    with pytest.raises(ValueError, match="its heads are cut already"):
        cut("llama", other, rank=1)
    assert {type(m) for m in model.modules()} == {type(m) for m in other.modules()}


def test_data_reach_the_heads_that_are_cut_first():
    """With data the loss of outputs is smaller than without, on the data themselves."""

    @torch.no_grad()
    def lost(calibration: Any) -> float:
        model = build("llama")
        data = batch(model, 40)
        before = model(**data).logits
        cut("llama", model, data if calibration else None, rank=2, include=("model.layers.0.*",))
        return float((model(**data).logits - before).square().mean())

    assert lost(True) < lost(False)


@pytest.mark.parametrize(
    ("rule", "reached"),
    [
        ({"ratio": 0.9}, lambda done, total: (total - done.parameters_before + done.parameters_after) / total),
        ({"layer_ratio": 0.5}, lambda done, _: done.parameters_after / done.parameters_before),
    ],
    ids=["ratio", "layer_ratio"],
)
def test_a_share_of_the_parameters_is_met(rule: dict[str, float], reached: Callable[[Any, int], float]) -> None:
    model = build("gpt2")
    total = sum(parameter.numel() for parameter in model.parameters())
    kinds = ("linear", "qk", "ov") if "layer_ratio" in rule else ("linear", "qk", "ov", "embedding")
    done = cut("gpt2", model, kinds=kinds, **rule)
    assert reached(done, total) == pytest.approx(next(iter(rule.values())), rel=0.01)
    assert sum(parameter.numel() for parameter in model.parameters()) == total - (
        done.parameters_before - done.parameters_after
    )


def test_a_budget_and_an_energy_go_by_spectra():
    for rule in ({"budget": 0.9}, {"energy": 0.9}):
        model = build("bert")
        done = cut("bert", model, batch(model, 40), kinds=("qk", "ov"), **rule)
        assert len({replacement.rank for replacement in done.replacements}) > 1, rule


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"kinds": ("qk",)}, "does not compute by qk products"),
        (
            "qwen3",
            {"kinds": ("qk", "ov"), "include": ("*.self_attn",)},
            "self_attn.qk cannot be cut: the attention does",
        ),
        ("llama", {"rank": 9}, r"rank of model.layers.0.self_attn.ov must be in \[1, 6\], got 9"),
        ("llama", {"kinds": ("ov",), "deep": True}, "deep are for linear layers and convolutions, not for kind 'ov'"),
        ("llama", {"kinds": ("ov",), "exclude": ("*o_proj",)}, "no layer of LlamaForCausalLM matches kinds=ov"),
    ],
    ids=["rotary", "named", "rank", "deep", "excluded"],
)
def test_heads_that_cannot_be_cut_are_named_with_the_reason(name, options, message):
    model = build(name)
    before = str(model)
    with pytest.raises(ValueError, match=message):
        cut(name, model, **{"rank": 2, **options})
    assert str(model) == before


def test_torchs_own_attention_is_passed_over():
    model = nn.TransformerEncoderLayer(HIDDEN, HEADS, 23, batch_first=True)
    done = factorize_(model, FactorizationConfig(kinds=("ov", "linear"), rank=2))
    assert "calls no layer" in done.skipped["self_attn.ov"] or "does not call it" in done.skipped["self_attn.ov"]


def test_an_attention_that_reads_weights_in_the_place_of_calls_is_passed_over():
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 7}
    convolutions = {"conv_dim": (4,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embedding_groups": 2}
    model = T.WavLMModel(T.WavLMConfig(**sizes, **convolutions, num_conv_pos_embeddings=4))
    done = factorize_(model, FactorizationConfig(kinds=("ov", "linear"), rank=2))
    reason = "WavLMAttention reads the weight of a layer of it and does not call that"
    assert done.skipped["encoder.layers.0.attention.ov"] == reason
    assert model.eval()(torch.randn(1, 50)).last_hidden_state.isfinite().all()  # as matrices of their own they are cut


@pytest.mark.parametrize("init", ["spectral_ones", "default", "he"])
def test_heads_may_start_anew(init):
    model = build("gpt2")
    cut("gpt2", model, rank=2, init=init)
    projection = model.transformer.h[0].attn.c_attn
    assert projection.weight.shape == (HIDDEN, 3 * 2 * HEADS)
    if init == "he":
        assert_close(projection.weight.detach().std().item(), (2 / HIDDEN) ** 0.5, rtol=0.2, atol=0)
    for product in find_products(model, ["ov"]) if init == "spectral_ones" else ():
        assert_close(product.singular_values(model), torch.ones(HEADS, 2, dtype=torch.float64))


def test_a_record_restores_a_model_of_plain_torch():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.head_dim = HEADS, WIDTH
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(self, name, nn.Linear(HIDDEN, HIDDEN))

        def forward(self, hidden_states: Tensor) -> Tensor:
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (getattr(self, f"{n}_proj")(hidden_states).view(shape).transpose(1, 2) for n in "qkv")
            return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, fresh, x = Attention(), Attention(), torch.randn(2, 7, HIDDEN)
    record = factorize_(model, FactorizationConfig(kinds=("qk", "ov"), rank=2)).to_dict()
    restore_(fresh, record)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    with torch.device("meta"):
        restore_(shapes := Attention(), record)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks by a name that Transformers gives up
def test_lora_around_narrow_heads_trains_and_merges_exactly():
    peft = pytest.importorskip("peft")
    model = build("llama", torch.float32)
    cut("llama", model, rank=2)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    expected = logits(adapted)
    adapted(**batch(model), labels=batch(model)["input_ids"]).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    merge_(adapted)
    assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    assert_close(logits(adapted.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_a_dense_model_with_the_configuration_of_one_that_is_cut_loads_as_it_is(tmp_path):
    model = build("llama", torch.float32)
    cut("llama", model, rank=2)
    dense = T.LlamaForCausalLM(model.config).eval()
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not narrow_layers(loaded)
    assert torch.equal(logits(loaded), logits(dense))
