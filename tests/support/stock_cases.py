"""Small stock models of many families, for surgery on their layers and heads."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from hf_fnl import merge_

HIDDEN, WIDTH, HEADS, GROUPS, VOCAB = 24, 6, 4, 2, 31
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": WIDTH,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_ENCODER = {key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 40, "eos_token_id": None}
_T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": WIDTH, "num_heads": HEADS, "num_layers": 2, "d_ff": 23}
_T5 |= {"decoder_start_token_id": 0}
_PHI3 = {key: value for key, value in _DECODER.items() if key != "head_dim"}
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
    """A class of models, its sizes, its head products, where values and a feed-forward layer are, what stays dense."""

    model: str
    sizes: dict[str, Any]
    values: str = "self_attn.v_proj"
    layer: str = "mlp.up_proj"
    kinds: tuple[str, ...] = ("ov",)
    skipped: tuple[str, ...] = ("lm_head",)


_BOTH = ("qk", "ov")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _DECODER),
    "llama-biases": Family("LlamaForCausalLM", {**_DECODER, "attention_bias": True, "head_dim": WIDTH + 2}),
    "qwen2": Family("Qwen2ForCausalLM", _DECODER),
    "qwen3": Family("Qwen3ForCausalLM", _DECODER),
    "gemma3": Family("Gemma3ForCausalLM", {**_DECODER, **_SLIDING}),
    "mistral": Family("MistralForCausalLM", {**_DECODER, "sliding_window": 5}),
    "phi3": Family("Phi3ForCausalLM", _PHI3, "self_attn.qkv_proj", "mlp.gate_up_proj"),
    "gpt2": Family("GPT2LMHeadModel", GPT2, "attn.c_attn", "mlp.c_fc", _BOTH),
    "opt": Family(
        "OPTForCausalLM", {**_ENCODER, "word_embed_proj_dim": HIDDEN, "ffn_dim": 23}, layer="layers.1.fc1", kinds=_BOTH
    ),
    "bert": Family(
        "BertForMaskedLM", _ENCODER, "self.value", "intermediate.dense", _BOTH, ("cls.predictions.decoder",)
    ),
    "t5": Family("T5ForConditionalGeneration", _T5, "SelfAttention.v", "DenseReluDense.wi", _BOTH),
    "mixtral": Family(
        "MixtralForCausalLM",
        _MIXTURE,
        layer="self_attn.q_proj",
        skipped=("lm_head", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"),
    ),
    "switch": Family(
        "SwitchTransformersForConditionalGeneration",
        {**_T5, **_SWITCH},
        "SelfAttention.v",
        "mlp.experts.expert_1.wi",
        _BOTH,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in evaluation mode, away from its initial values."""
    torch.manual_seed(0)
    model_class = getattr(transformers, FAMILIES[name].model)
    model = model_class(model_class.config_class(**FAMILIES[name].sizes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def batch(model: PreTrainedModel, length: int = 9) -> dict[str, Tensor]:
    """Inputs, the same at every call."""
    ids = torch.randint(3, VOCAB, (4, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


def logits(model: PreTrainedModel) -> Tensor:
    """What a model makes of its batch."""
    with torch.no_grad():
        return model(**batch(model)).logits


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A dense copy."""
    plain = copy.deepcopy(model)
    merge_(plain)
    return plain
