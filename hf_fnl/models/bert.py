"""Factorized BERT: configuration, backbone and every head that Transformers has for BERT."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert as stock

from hf_fnl.config import LayerRank, LayerRanks, TransformerRanks
from hf_fnl.layers import FactorizedEmbedding, FactorizedLinear
from hf_fnl.models.attention import FactorizedAttention, HeadProjection, pad_heads
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.conversion import Shared

_OF_A_CLASS = {"model_type", "architectures", "transformers_version"}  # what a configuration of another class has anew


@strict
class FactorizedBertConfig(BertConfig):
    """Configuration of a BERT whose matrices are held as products; every other field is :class:`BertConfig`'s.

    Args:
        qk_rank: Rank of every head's query-key product, up to ``hidden_size / num_attention_heads``; ``None`` leaves
            the stock projections. This and the next two are numbers, or lists with one entry for each layer.
        ov_rank: Rank of every head's output-value product, likewise. It may differ from ``qk_rank``.
        ffn_rank: Rank of both feed-forward matrices of a layer, up to ``hidden_size``; ``None`` leaves them dense.
        embedding_rank: Rank of the word embedding and of the MLM decoder tied to it; ``None`` leaves them dense.
        factor_init: ``"spectral"`` (Khodak et al. 2021), ``"spectral_ones"`` (Kamalakara et al. 2022) or ``"default"``.
        sparse_prediction: In training, compute the vocabulary logits at labelled positions only.

    Raises:
        ValueError: If a rank does not fit the model or ``factor_init`` is unknown.
    """

    model_type = "factorized_bert"

    qk_rank: LayerRank = None
    ov_rank: LayerRank = None
    ffn_rank: LayerRank = None
    embedding_rank: int | None = None
    factor_init: str = "spectral"
    sparse_prediction: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.ranks.check(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            num_layers=self.num_hidden_layers,
        )

    @property
    def ranks(self) -> TransformerRanks:
        """The fields that concern products."""
        return TransformerRanks(
            qk_rank=self.qk_rank,
            ov_rank=self.ov_rank,
            ffn_rank=self.ffn_rank,
            embedding_rank=self.embedding_rank,
            init=self.factor_init,
        )

    def to_dense(self) -> BertConfig:
        """The configuration of the stock model of the same sizes."""
        ours = {"qk_rank", "ov_rank", "ffn_rank", "embedding_rank", "factor_init", "sparse_prediction"}
        return BertConfig(**{key: value for key, value in self.to_dict().items() if key not in ours | _OF_A_CLASS})

    @classmethod
    def from_dense(cls, dense: BertConfig, **ranks: Any) -> "FactorizedBertConfig":
        """This configuration with the sizes of a stock one."""
        return cls(**{key: value for key, value in dense.to_dict().items() if key not in _OF_A_CLASS}, **ranks)


def _attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over heads ``(batch, heads, length, rank)`` with the configured kernel."""
    attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, stock.eager_attention_forward
    )
    dropout = attention.dropout.p if attention.training else 0.0
    context, weights = attend(
        attention, query, key, value, attention_mask, dropout=dropout, scaling=attention.scaling, **kwargs
    )
    return context.flatten(-2), weights


class _Heads(nn.Module):
    """Projections whose heads are ``qk_rank`` and ``ov_rank`` wide in place of ``hidden_size / heads``."""

    def __init__(self, config: FactorizedBertConfig, ranks: LayerRanks, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        heads, head_dim = config.num_attention_heads, self.attention_head_size
        self.query = HeadProjection(config.hidden_size, heads * (ranks.qk or head_dim))
        self.key = HeadProjection(config.hidden_size, heads * (ranks.qk or head_dim))
        self.value = HeadProjection(config.hidden_size, heads * (ranks.ov or head_dim))

    def split_heads(self, states: Tensor) -> Tensor:
        """``(batch, length, heads * rank)`` to ``(batch, heads, length, rank)``."""
        return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


class FactorizedBertSelfAttention(_Heads, stock.BertSelfAttention):
    """Self-attention whose query-key and output-value products may have different ranks."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock layer; returns the concatenated heads ``(batch, length, heads * ov_rank)`` and the weights."""
        query = self.split_heads(self.query(hidden_states))
        key = self.split_heads(self.key(hidden_states))
        value = self.split_heads(self.value(hidden_states))
        if past_key_values is not None:
            cache = past_key_values
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            key, value = cache.update(key, value, self.layer_idx)
        return _attend(self, query, key, value, attention_mask, **kwargs)


class FactorizedBertCrossAttention(_Heads, stock.BertCrossAttention):
    """Cross-attention whose query-key and output-value products may have different ranks."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock layer: keys and values of the encoder are computed once and then taken from the cache."""
        query = self.split_heads(self.query(hidden_states))
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            cached = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return _attend(self, query, cached.keys, cached.values, attention_mask, **kwargs)
        key = self.split_heads(self.key(encoder_hidden_states))
        value = self.split_heads(self.value(encoder_hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.cross_attention_cache.update(key, value, self.layer_idx)
            past_key_values.is_updated[self.layer_idx] = True
        return _attend(self, query, key, value, attention_mask, **kwargs)


class FactorizedBertAttention(FactorizedAttention, stock.BertAttention):
    """An attention block of BERT with factorized heads, in the place of a stock one whose other parts it keeps."""

    def __init__(self, config: FactorizedBertConfig, ranks: LayerRanks, dense: stock.BertAttention) -> None:
        nn.Module.__init__(self)
        self.is_cross_attention = dense.is_cross_attention
        inner = FactorizedBertCrossAttention if self.is_cross_attention else FactorizedBertSelfAttention
        self.self: Any = inner(config, ranks, is_causal=dense.self.is_causal, layer_idx=dense.self.layer_idx)
        self.output: Any = dense.output
        self.output.dense = HeadProjection(self.self.value.out_features, config.hidden_size)
        self.num_heads, self.ranks = config.num_attention_heads, ranks

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """Query, key, value and output."""
        return self.self.query, self.self.key, self.self.value, self.output.dense


class FactorizedBertLMPredictionHead(stock.BertLMPredictionHead):
    """The MLM head, with a decoder that may be factorized and one output bias in place of two tied ones."""

    def __init__(self, config: FactorizedBertConfig) -> None:
        super().__init__(config)
        dense = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        rank, method = config.embedding_rank, config.factor_init
        self.decoder = dense if rank is None else FactorizedLinear.empty_like(dense, rank, init=method)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Vocabulary logits of hidden states of any leading shape."""
        logits = self.decoder(self.transform(hidden_states))
        return logits.add_(self.bias)  # in place: nothing else in a step is as large


class FactorizedBertPreTrainedModel(FactorizedPreTrainedModel, stock.BertPreTrainedModel):
    """What the backbone and the heads share."""

    config: FactorizedBertConfig
    config_class = FactorizedBertConfig
    attention_class = FactorizedBertAttention
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

    def _dense_state_dict(self) -> dict[str, Tensor]:
        state = super()._dense_state_dict()
        for name, module in self.named_modules():
            if isinstance(module, FactorizedBertAttention):
                heads, head_dim = module.num_heads, module.self.attention_head_size
                for projection in ("query", "key", "value"):
                    for key in (f"{name}.self.{projection}.weight", f"{name}.self.{projection}.bias"):
                        state[key] = pad_heads(state[key], heads, head_dim)
                key = f"{name}.output.dense.weight"
                state[key] = pad_heads(state[key], heads, head_dim, dim=1)
        if "cls.predictions.bias" in state:
            state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
        return state


class FactorizedBertModel(FactorizedBertPreTrainedModel, stock.BertModel):
    """The backbone of BERT with its matrices held as products, as its configuration says."""

    dense_class = stock.BertModel

    def post_init(self) -> None:
        """Put factorized modules in the place of the stock ones, then initialize as every model does."""
        with init.no_init_weights():
            self._replace_modules()
        super().post_init()

    def _replace_modules(self) -> None:
        config = self.config
        for number, layer in enumerate(self.encoder.layer):
            ranks = config.ranks.of_layer(number)
            if ranks.qk is not None or ranks.ov is not None:
                layer.attention = FactorizedBertAttention(config, ranks, layer.attention)
                if config.add_cross_attention:
                    layer.crossattention = FactorizedBertAttention(config, ranks, layer.crossattention)
            if ranks.ffn is not None:
                for block in (layer.intermediate, layer.output):
                    block.dense = FactorizedLinear.empty_like(block.dense, ranks.ffn, init=ranks.init)
        if config.embedding_rank is not None:
            self.embeddings.word_embeddings = FactorizedEmbedding.empty_like(
                self.embeddings.word_embeddings, config.embedding_rank, init=config.factor_init
            )
