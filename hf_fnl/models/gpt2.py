"""Factorized GPT-2: configuration and backbone."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

from hf_fnl.layers import Factorized, FactorizedEmbedding, FactorizedLinear
from hf_fnl.layers.span import Span
from hf_fnl.models.attention import (
    FactorizedAttention,
    HeadConv1D,
    Spans,
    attend,
    cached_heads,
    draw_normal_,
    split_heads,
)
from hf_fnl.models.base import FactorizedBackbone, FactorizedPreTrainedModel, init_factors
from hf_fnl.models.configuration import FactorizedConfig
from hf_fnl.models.conversion import Shared
from hf_fnl.models.forwards import CACHE, extends
from hf_fnl.surgery.config import LayerRank, LayerRanks


@strict
class FactorizedGPT2Config(FactorizedConfig, GPT2Config):
    """Configuration of a GPT-2 whose matrices are held as products.

    The other ranks and ``factor_init`` are those of :class:`~hf_fnl.models.configuration.FactorizedConfig`, every other
    field is :class:`GPT2Config`'s. Kamalakara et al. 2022 set ``qkv_rank`` and ``ffn_rank`` to 62.5 % of ``n_embd`` and
    leave the output projection of the attention dense.

    Args:
        qkv_rank: Rank of the one matrix ``(n_embd, 3 n_embd)`` that gives queries, keys and values, and of both input
            matrices of a cross-attention, up to ``n_embd``; in the place of ``qk_rank`` and ``ov_rank``. A number, or a
            list with one for each layer.
        fused_loss: In training, compute the loss of a language model without holding all logits; its output then has
            none.

    Raises:
        ValueError: If a rank does not fit the model, ``qkv_rank`` is given together with ``qk_rank`` or ``ov_rank``, or
            ``factor_init`` is unknown.
    """

    model_type = "factorized_gpt2"
    dense_class = GPT2Config

    qkv_rank: LayerRank = None
    fused_loss: bool = True

    def _sizes(self) -> Mapping[str, int]:
        return {
            "hidden_size": self.n_embd,
            "num_heads": self.n_head,
            "intermediate_size": self.n_inner or 4 * self.n_embd,
            "vocab_size": self.vocab_size,
            "num_layers": self.n_layer,
        }


class ResidualProjection(FactorizedLinear):
    """The second matrix of a feed-forward block, which the block draws, smaller the deeper the model is."""


class FactorizedGPT2Attention(FactorizedAttention, stock.GPT2Attention):
    """Attention whose query-key and output-value products may have different ranks.

    ``c_attn`` holds ``[Q | K | V]``, and ``[K | V]`` beside a ``q_attn`` in a cross-attention, as in the stock layer.
    """

    config: FactorizedGPT2Config
    head_dim: int
    embed_dim: int
    layer_idx: int
    is_cross_attention: bool
    q_attn: Conv1D
    c_attn: Conv1D
    c_proj: Conv1D
    attn_dropout: Any
    resid_dropout: Any

    def __init__(self, config: FactorizedGPT2Config, ranks: LayerRanks, dense: stock.GPT2Attention) -> None:
        super().__init__(config, is_cross_attention=dense.is_cross_attention, layer_idx=dense.layer_idx)
        self.ranks = ranks
        qk, ov = (self.num_heads * (rank or self.head_dim) for rank in (ranks.qk, ranks.ov))
        self.qk_width, self.ov_width = qk, ov
        if self.is_cross_attention:
            self.q_attn = HeadConv1D(qk, self.embed_dim)
        self.c_attn = HeadConv1D(qk + ov if self.is_cross_attention else 2 * qk + ov, self.embed_dim)
        self.c_proj = HeadConv1D(self.embed_dim, ov)

    @staticmethod
    def projections(attention: Any) -> Spans:
        """Query, key, value and output, of our attention or a stock one."""
        fused, output = attention.c_attn, attention.c_proj
        ov = output.weight.shape[0]
        if attention.is_cross_attention:
            qk = attention.q_attn.nf
            return Span(attention.q_attn), Span(fused, 0, qk), Span(fused, qk, ov), Span(output)
        qk = (fused.nf - ov) // 2
        return Span(fused, 0, qk), Span(fused, qk, qk), Span(fused, 2 * qk, ov), Span(output)

    def output_std(self, std: float) -> float:
        """That of the end of a residual branch."""
        return residual_std(self.config)

    def draw_heads(self, hidden: int, std: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four dense weights, drawn in the layout and the order of the stock model."""
        widths = [2, 1] if self.is_cross_attention else [3]
        fused, *query = (draw_normal_(self.c_attn.weight.new_empty(hidden, n * hidden), std) for n in widths)
        draw_normal_(fused.new_empty(hidden, hidden), std)  # the stock model draws its output matrix twice
        output = draw_normal_(fused.new_empty(hidden, hidden), self.output_std(std))
        inputs = *query, *fused.chunk(widths[0], dim=1)
        return inputs[0].mT, inputs[1].mT, inputs[2].mT, output.mT

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock layer; keys and values of an encoder are computed once and then taken from the cache."""
        cache, crossing = options.pop(CACHE, None), self.is_cross_attention
        qk, ov = self.qk_width, self.ov_width  # not asked of the layers: LoRA and its like wrap them

        def project(layer: nn.Module, states: Any, *widths: int) -> Any:
            return tuple(split_heads(part, self.num_heads) for part in layer(states).split(widths, dim=-1))

        if crossing:
            (query,), mask = project(self.q_attn, hidden_states, qk), encoder_attention_mask
        else:
            (query, *own), mask = project(self.c_attn, hidden_states, qk, qk, ov), attention_mask
        key, value = cached_heads(
            lambda: project(self.c_attn, encoder_hidden_states, qk, ov) if crossing else tuple(own),
            cache,
            self.layer_idx,
            crossing=crossing,
            options=options,
        )
        context, weights = self._attend((query, key, value), mask, **options)
        return self.resid_dropout(self.c_proj(context)), weights

    def _attend(
        self, heads: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.reorder_and_upcast_attn and self.config._attn_implementation == "eager":
            context, weights = super()._upcast_and_reordered_attn(*heads, mask)
            return context.flatten(-2), weights
        return attend(self, stock.eager_attention_forward, heads, mask, dropout=self.attn_dropout.p, **kwargs)


def residual_std(config: GPT2Config) -> float:
    """Scale of the matrices at the end of a residual branch, of which a model has two in a layer."""
    return config.initializer_range / math.sqrt(2 * config.n_layer)


class FactorizedGPT2PreTrainedModel(FactorizedPreTrainedModel, stock.GPT2PreTrainedModel):
    """What the backbone and the heads share."""

    config: FactorizedGPT2Config
    config_class = FactorizedGPT2Config
    attention_class = FactorizedGPT2Attention
    # Most stock heads return the mean over their own batch, whatever the number of items that the Trainer passes.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ResidualProjection):
            draw_normal_(module.U.new_empty(module.shape), self.config.initializer_range)  # as the stock model does
        else:
            super()._init_weights(module)
        if isinstance(module, stock.GPT2MLP) and isinstance(module.c_proj, Factorized):
            init_factors(module.c_proj, residual_std(self.config))

    @classmethod
    def _shared_ranks(cls, dense: PreTrainedModel) -> Shared:
        prefix = "" if isinstance(dense, stock.GPT2Model) else "transformer."
        layers = [f"{prefix}h.{number}" for number in range(dense.config.n_layer)]
        attentions = {"attn": ["c_attn"]}
        if dense.config.add_cross_attention:
            attentions["crossattention"] = ["c_attn", "q_attn"]
        heads = [[f"{layer}.{attention}" for attention in attentions] for layer in layers]
        return {
            "qk_rank": heads,
            "ov_rank": heads,
            "qkv_rank": [
                [f"{layer}.{attention}.{name}" for attention, names in attentions.items() for name in names]
                for layer in layers
            ],
            "ffn_rank": [[f"{layer}.mlp.c_fc", f"{layer}.mlp.c_proj"] for layer in layers],
            "embedding_rank": [[f"{prefix}wte"]],
        }


class FactorizedGPT2Model(FactorizedBackbone, FactorizedGPT2PreTrainedModel, stock.GPT2Model):
    """The backbone of GPT-2 with its matrices held as products, as its configuration says."""

    dense_class = stock.GPT2Model

    @extends(stock.GPT2Model.forward)
    def forward(self, **inputs: Any) -> Any:
        """As the stock model."""
        return super().forward(**inputs)

    def _replace_modules(self) -> None:
        config, all_ranks = self.config, self.config.ranks
        for number, block in enumerate(self.h):
            ranks = all_ranks.of_layer(number)
            block.attn = _attention(config, ranks, block.attn)
            if config.add_cross_attention:
                block.crossattention = _attention(config, all_ranks.of_layer(number, "cross"), block.crossattention)
            if ranks.ffn is not None:
                mlp, method = block.mlp, ranks.init["linear"]
                mlp.c_fc = FactorizedLinear.empty_like(mlp.c_fc, ranks.ffn, init=method)
                mlp.c_proj = ResidualProjection.empty_like(mlp.c_proj, ranks.ffn, init=method)
        if config.embedding_rank is not None:
            method = all_ranks.method("embedding")
            self.set_input_embeddings(FactorizedEmbedding.empty_like(self.wte, config.embedding_rank, init=method))


def _attention(config: FactorizedGPT2Config, ranks: LayerRanks, dense: stock.GPT2Attention) -> stock.GPT2Attention:
    """The attention with these ranks in the place of a dense one."""
    if ranks.qk is not None or ranks.ov is not None:
        return FactorizedGPT2Attention(config, ranks, dense)
    if ranks.qkv is not None:
        inputs = {name: layer for name, layer in dense.named_children() if name in ("c_attn", "q_attn")}
        for name, layer in inputs.items():
            setattr(dense, name, FactorizedLinear.empty_like(layer, ranks.qkv, init=ranks.init["linear"]))
    return dense
