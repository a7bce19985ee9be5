"""One table of families: cut with data, layers and heads at once, saved, read, generating, and dense again.

What stays dense is named. Of mixtures of experts, the layers of experts are cut where they are linear layers.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_fnl import FactorizationConfig, factorize_, load, merge_, to_linear_
from hf_fnl.layers import FactorizedLinear, HeadProjection, LinearPair

VOCAB, WIDTH, RANK = 31, 6, 2
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": WIDTH,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "head_dim")}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40, "eos_token_id": None}
_T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": WIDTH, "num_heads": 4, "num_layers": 2, "d_ff": 23}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_MIXTURE = {**_DECODER, "intermediate_size": 32, "num_local_experts": 3, "num_experts_per_tok": 2}
_SWITCH = {
    "num_experts": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "expert_capacity": 64,
}


class Family(NamedTuple):
    """A class of models, its sizes, where its heads and a feed-forward layer are, and what of it stays dense."""

    model: str
    sizes: dict[str, Any]
    heads: str  # the layer of an attention that gives values
    layer: str
    skipped: tuple[str, ...] = ("lm_head",)


FAMILIES = {
    "llama": Family("LlamaForCausalLM", _DECODER, "self_attn.v_proj", "mlp.up_proj"),
    "qwen2": Family("Qwen2ForCausalLM", _DECODER, "self_attn.v_proj", "mlp.up_proj"),
    "qwen3": Family("Qwen3ForCausalLM", _DECODER, "self_attn.v_proj", "mlp.up_proj"),
    "gemma3": Family("Gemma3ForCausalLM", {**_DECODER, **_SLIDING}, "self_attn.v_proj", "mlp.up_proj"),
    "mistral": Family("MistralForCausalLM", {**_DECODER, "sliding_window": 5}, "self_attn.v_proj", "mlp.up_proj"),
    "gpt2": Family("GPT2LMHeadModel", _GPT2, "attn.c_attn", "mlp.c_fc"),
    "opt": Family(
        "OPTForCausalLM", {**_ENCODER, "word_embed_proj_dim": 24, "ffn_dim": 23}, "self_attn.v_proj", "layers.1.fc1"
    ),
    "bert": Family("BertForMaskedLM", _ENCODER, "self.value", "intermediate.dense", ("cls.predictions.decoder",)),
    "t5": Family(
        "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, "SelfAttention.v", "DenseReluDense.wi"
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _MIXTURE,
        "self_attn.v_proj",
        "self_attn.q_proj",
        ("lm_head", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"),
    ),
    "switch": Family(
        "SwitchTransformersForConditionalGeneration",
        {**_T5, **_SWITCH, "decoder_start_token_id": 0},
        "SelfAttention.v",
        "mlp.experts.expert_1.wi",
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def build(family: Family) -> PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, family.model)
    model = model_class(model_class.config_class(**family.sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def batch(model: PreTrainedModel, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (4, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**batch(model)).logits


def cut(family: Family, rank_scale: float, **data: Any) -> tuple[PreTrainedModel, Any]:
    model = build(family)
    return model, factorize_(model, FactorizationConfig(kinds=("ov", "linear"), rank_scale=rank_scale), **data)


@each_family
def test_at_full_rank_data_change_nothing_and_what_stays_dense_is_named(family: Family) -> None:
    model = build(family)
    expected = logits(model)
    model, done = cut(family, 1.0, calibration=[batch(model, 40)])
    assert {replacement.kind for replacement in done.replacements} == {"ov", "linear"}
    names = [name for replacement in done.replacements for name in replacement.records]
    assert any(name.endswith(family.heads) for name in names)
    assert any(name.endswith(family.layer) for name in names)
    assert {name for name in done.skipped if not name.endswith(family.skipped)} <= _positions(model)
    assert all(any(name.endswith(end) for name in done.skipped) for end in family.skipped)
    assert_close(logits(model), expected, rtol=1e-2, atol=1e-2 * expected.std().item())


@each_family
def test_cut_it_is_saved_read_generates_and_is_made_dense_again(family: Family, tmp_path: Path) -> None:
    model, done = cut(family, 0.4, calibration=[batch(build(family), 40)])
    values, layer = (
        next(module for name, module in model.named_modules() if name.endswith(end))
        for end in (family.heads, family.layer)
    )
    assert isinstance(values, HeadProjection)
    assert values.heads[-1][1] == RANK
    assert isinstance(layer, FactorizedLinear)
    assert model.num_parameters() == build(family).num_parameters() - done.parameters_before + done.parameters_after
    expected = logits(model)
    model.save_pretrained(tmp_path / "cut")
    loaded = load(tmp_path / "cut")
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    if model.can_generate():
        found = words(loaded)
        assert torch.equal(found, words(loaded, use_cache=False))
        assert torch.equal(found, words(merged(loaded)))
    to_linear_(loaded)
    assert any(isinstance(module, LinearPair) for module in loaded.modules())
    assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)
    merge_(loaded)
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in build(family).named_modules()]
    assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)


def words(model: PreTrainedModel, **options: Any) -> Tensor:
    ids = batch(model)["input_ids"]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, **options)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    plain = copy.deepcopy(model)
    merge_(plain)
    return plain


def _positions(model: PreTrainedModel) -> set[str]:
    """The tables, which are of no kind that is asked for."""
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
