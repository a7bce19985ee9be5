"""Stock models with few and mostly coprime sizes, and the projections of their attentions, cut by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers as T
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from hf_fnl.attention import AttentionProjections, Section

HIDDEN, HEADS, VOCABULARY, LAYERS = 15, 3, 13, 2

_COMMON = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 7,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 11,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_COMMON, "num_attention_heads": 6, "num_key_value_heads": 2, **TOKENS}
_GPT2 = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "vocab_size": VOCABULARY, "n_positions": 11, **TOKENS}
_VIT = {name: _COMMON[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")}


@dataclass(frozen=True)
class Case:
    """A stock model and where its attentions are.

    Args:
        config: Of the model that ``AutoModel`` builds.
        attentions: Names of its attentions, with ``{}`` for the layer.
        projections: From an attention to ``Q``, ``K``, ``V`` of shape ``(d, heads * r)`` and ``O``, ``(heads * r, d)``.
        heads: Query heads.
        kv_heads: Key and value heads.
    """

    config: Callable[[], T.PretrainedConfig]
    attentions: tuple[str, ...]
    projections: Callable[[nn.Module], Sequence[Tensor]]
    heads: int = HEADS
    kv_heads: int = HEADS

    def build(self) -> nn.Module:
        """The model, with biases of zero and matrices large enough for their products to matter."""
        torch.manual_seed(0)
        model = T.AutoModel.from_config(self.config(), attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.5)
        return model

    def names(self) -> list[str]:
        """Names of all attentions."""
        return [name.format(layer) for name in self.attentions for layer in range(LAYERS)]


def _linear(*names: str) -> Callable[[nn.Module], list[Tensor]]:
    return lambda attention: [attention.get_submodule(name).weight.T for name in names]


def _gpt2(attention: nn.Module) -> list[Tensor]:
    return [*attention.c_attn.weight.split(HIDDEN, 1), attention.c_proj.weight]


def _gpt2_cross(attention: nn.Module) -> list[Tensor]:
    return [attention.q_attn.weight, *attention.c_attn.weight.split(HIDDEN, 1), attention.c_proj.weight]


def _phi3(attention: nn.Module) -> list[Tensor]:
    return [*attention.qkv_proj.weight.T.split([24, 8, 8], 1), attention.o_proj.weight.T]


def rotary_attention(module: nn.Module) -> AttentionProjections | None:
    """An adapter of the attentions here whose queries and keys are products at one position only."""
    if isinstance(module, LlamaAttention):
        return AttentionProjections(module.q_proj, module.k_proj, module.v_proj, module.o_proj, 6)
    if isinstance(module, Phi3Attention):
        weight, sizes = module.qkv_proj.weight, ((0, 24), (24, 8), (32, 8))
        return AttentionProjections(*(Section(weight, *size) for size in sizes), module.o_proj, 6)
    return None


_bert = _linear("self.query", "self.key", "self.value", "output.dense")
_llama = _linear("q_proj", "k_proj", "v_proj", "o_proj")

CASES = {
    "bert": Case(lambda: T.BertConfig(**_COMMON), ("encoder.layer.{}.attention",), _bert),
    "roberta": Case(lambda: T.RobertaConfig(**_COMMON), ("encoder.layer.{}.attention",), _bert),
    "distilbert": Case(
        lambda: T.DistilBertConfig(dim=HIDDEN, n_layers=LAYERS, n_heads=HEADS, hidden_dim=7, vocab_size=VOCABULARY),
        ("transformer.layer.{}.attention",),
        _linear("q_lin", "k_lin", "v_lin", "out_lin"),
    ),
    "deberta-v2": Case(
        lambda: T.DebertaV2Config(**_COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True),
        ("encoder.layer.{}.attention",),
        _linear("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
    ),
    "gpt2": Case(lambda: T.GPT2Config(**_GPT2), ("h.{}.attn",), _gpt2),
    "llama": Case(
        lambda: T.LlamaConfig(**{**_GROUPED, "hidden_size": 18}, head_dim=4), ("layers.{}.self_attn",), _llama, 6, 2
    ),
    "phi3": Case(lambda: T.Phi3Config(**{**_GROUPED, "hidden_size": 24}), ("layers.{}.self_attn",), _phi3, 6, 2),
    "t5": Case(
        lambda: T.T5Config(
            d_model=HIDDEN, d_kv=4, num_heads=HEADS, d_ff=7, num_layers=LAYERS, vocab_size=VOCABULARY, **TOKENS
        ),
        (
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        ),
        _linear("q", "k", "v", "o"),
    ),
    "vit": Case(
        lambda: T.ViTConfig(**_VIT, intermediate_size=7, image_size=4, patch_size=2), ("layers.{}.attention",), _llama
    ),
}
CROSS = Case(
    lambda: T.GPT2Config(**_GPT2, add_cross_attention=True), ("h.{}.crossattention",), _gpt2_cross
)  # besides the attentions of GPT-2
