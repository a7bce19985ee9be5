"""Factorized BERT: configuration, backbone and every head that Transformers has for BERT."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.bert import modeling_bert as stock

from hf_fnl.layers import FactorizedEmbedding, FactorizedLinear
from hf_fnl.layers.span import Span
from hf_fnl.models.attention import FactorizedAttention, HeadProjection, Spans, attend, cached_heads, split_heads
from hf_fnl.models.base import FactorizedBackbone, FactorizedPreTrainedModel
from hf_fnl.models.configuration import FactorizedConfig
from hf_fnl.models.conversion import Shared
from hf_fnl.models.forwards import CACHE, extends
from hf_fnl.models.packing import Packing, packed_attention, unpack
from hf_fnl.surgery.config import LayerRanks


@strict
class FactorizedBertConfig(FactorizedConfig, BertConfig):
    """Configuration of a BERT whose matrices are held as products.

    The ranks and ``factor_init`` are those of :class:`~hf_fnl.models.configuration.FactorizedConfig`, every other field
    is :class:`BertConfig`'s.

    Args:
        sparse_prediction: In training, compute the vocabulary logits at labelled positions only.

    Raises:
        ValueError: If a rank does not fit the model or ``factor_init`` is unknown.
    """

    model_type = "factorized_bert"
    dense_class = BertConfig

    sparse_prediction: bool = True

    def _sizes(self) -> Mapping[str, int]:
        return {
            "hidden_size": self.hidden_size,
            "num_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "num_layers": self.num_hidden_layers,
        }


class _Heads(nn.Module):
    """Projections whose heads are ``qk_rank`` and ``ov_rank`` wide in place of ``hidden_size / heads``."""

    num_attention_heads: int
    attention_head_size: int
    layer_idx: int
    dropout: nn.Dropout

    def __init__(self, config: FactorizedBertConfig, ranks: LayerRanks, dense: Any) -> None:
        nn.Module.__init__(self)
        # Of the stock module all but its projections: to make others of their size would only cost time.
        vars(self).update({name: value for name, value in vars(dense).items() if not name.startswith("_")})
        self.dropout = dense.dropout
        heads, head_dim = config.num_attention_heads, self.attention_head_size
        self.query = HeadProjection(config.hidden_size, heads * (ranks.qk or head_dim))
        self.key = HeadProjection(config.hidden_size, heads * (ranks.qk or head_dim))
        self.value = HeadProjection(config.hidden_size, heads * (ranks.ov or head_dim))

    def _attend(
        self, hidden_states: Tensor, states: Tensor, attention_mask: Tensor | None, *, crossing: bool, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Queries of ``hidden_states`` against keys of ``states``; returns the heads side by side, and the weights."""
        count, cache = self.num_attention_heads, options.pop(CACHE, None)
        key, value = cached_heads(
            lambda: (split_heads(self.key(states), count), split_heads(self.value(states), count)),
            cache,
            self.layer_idx,
            crossing=crossing,
            options=options,
        )
        heads = split_heads(self.query(hidden_states), count), key, value
        return attend(self, stock.eager_attention_forward, heads, attention_mask, dropout=self.dropout.p, **options)


class FactorizedBertSelfAttention(_Heads, stock.BertSelfAttention):
    """Self-attention whose query-key and output-value products may have different ranks."""

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock layer; returns the concatenated heads ``(batch, length, heads * ov_rank)`` and the weights."""
        return self._attend(hidden_states, hidden_states, attention_mask, crossing=False, **options)


class FactorizedBertCrossAttention(_Heads, stock.BertCrossAttention):
    """Cross-attention whose query-key and output-value products may have different ranks."""

    def forward(
        self,
        hidden_states: Tensor,
        *,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock layer: keys and values of the encoder are computed once and then taken from the cache."""
        return self._attend(hidden_states, encoder_hidden_states, attention_mask, crossing=True, **options)


class FactorizedBertAttention(FactorizedAttention, stock.BertAttention):
    """An attention block of BERT with factorized heads, in the place of a stock one whose other parts it keeps."""

    def __init__(self, config: FactorizedBertConfig, ranks: LayerRanks, dense: stock.BertAttention) -> None:
        nn.Module.__init__(self)
        self.is_cross_attention = dense.is_cross_attention
        inner = FactorizedBertCrossAttention if self.is_cross_attention else FactorizedBertSelfAttention
        self.self: Any = inner(config, ranks, dense.self)
        self.output: Any = dense.output
        self.output.dense = HeadProjection(self.self.value.out_features, config.hidden_size)
        self.num_heads, self.ranks = config.num_attention_heads, ranks

    @staticmethod
    def projections(attention: Any) -> Spans:
        """Query, key, value and output."""
        inner = attention.self
        return Span(inner.query), Span(inner.key), Span(inner.value), Span(attention.output.dense)


class FactorizedBertPreTrainedModel(FactorizedPreTrainedModel, stock.BertPreTrainedModel):
    """What the backbone and the heads share."""

    config: FactorizedBertConfig
    config_class = FactorizedBertConfig
    attention_class = FactorizedBertAttention
    takes_packing = True  # see hf_fnl.models.packing
    # Most stock heads return the mean over their own batch, whatever the number of items that the Trainer passes.
    accepts_loss_kwargs = False

    @classmethod
    def _shared_ranks(cls, dense: PreTrainedModel) -> Shared:
        prefix = "" if isinstance(dense, stock.BertModel) else "bert."
        layers = [f"{prefix}encoder.layer.{number}" for number in range(dense.config.num_hidden_layers)]
        attentions = ("attention", "crossattention") if dense.config.add_cross_attention else ("attention",)
        heads = [[f"{layer}.{attention}" for attention in attentions] for layer in layers]
        return {
            "qk_rank": heads,
            "ov_rank": heads,
            "ffn_rank": [[f"{layer}.intermediate.dense", f"{layer}.output.dense"] for layer in layers],
            "embedding_rank": [[f"{prefix}embeddings.word_embeddings"]],
        }


class FactorizedBertModel(FactorizedBackbone, FactorizedBertPreTrainedModel, stock.BertModel):
    """The backbone of BERT with its matrices held as products, as its configuration says."""

    dense_class = stock.BertModel

    @extends(stock.BertModel.forward)
    def forward(self, *, packing: Packing | None = None, **inputs: Any) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """As the stock model; of a packed batch the outputs are those of a padded one, a sequence a row.

        Args:
            packing: How the sequences lie in the rows; see :mod:`hf_fnl.models.packing`. Takes the place of
                ``attention_mask``. ``hidden_states`` and ``attentions``, where asked for, stay in rows.
        """
        if packing is None:
            return super().forward(**inputs)
        if any(inputs.get(name) is not None for name in ("attention_mask", CACHE)) or self.config.is_decoder:
            raise ValueError("packing is for encoders and takes the place of attention_mask: leave one of them out")
        outputs = super().forward(**(inputs | packed_attention(packing, self.config, self.dtype)))
        outputs.last_hidden_state = unpack(outputs.last_hidden_state, packing)
        if self.pooler is not None:
            outputs.pooler_output = self.pooler(outputs.last_hidden_state)
        return outputs

    def _replace_modules(self) -> None:
        config, all_ranks = self.config, self.config.ranks
        for number, layer in enumerate(self.encoder.layer):
            ranks = all_ranks.of_layer(number)
            if ranks.qk is not None or ranks.ov is not None:
                layer.attention = FactorizedBertAttention(config, ranks, layer.attention)
                if config.add_cross_attention:
                    cross = all_ranks.of_layer(number, "cross")
                    layer.crossattention = FactorizedBertAttention(config, cross, layer.crossattention)
            if ranks.ffn is not None:
                for block in (layer.intermediate, layer.output):
                    block.dense = FactorizedLinear.empty_like(block.dense, ranks.ffn, init=ranks.init["linear"])
        if config.embedding_rank is not None:
            self.embeddings.word_embeddings = FactorizedEmbedding.empty_like(
                self.embeddings.word_embeddings, config.embedding_rank, init=all_ranks.method("embedding")
            )
