"""Factorized Marian: configuration, encoder and decoder, and the encoder-decoder backbone."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import MarianConfig, PegasusConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.marian import modeling_marian as stock
from transformers.models.pegasus import modeling_pegasus as pre_norm

from hf_fnl.layers import FactorizedEmbedding, FactorizedLinear
from hf_fnl.layers.span import Span
from hf_fnl.models.attention import (
    FactorizedAttention,
    HeadProjection,
    Spans,
    attend,
    cached_heads,
    draw_normal_,
    is_loaded,
    split_heads,
)
from hf_fnl.models.base import FactorizedBackbone, FactorizedPreTrainedModel
from hf_fnl.models.configuration import FactorizedConfig
from hf_fnl.models.conversion import Shared
from hf_fnl.models.forwards import CACHE, extends
from hf_fnl.models.vocabulary import tied_factors
from hf_fnl.surgery.config import LayerRanks

_POSITIONS = (stock.MarianSinusoidalPositionalEmbedding, pre_norm.PegasusSinusoidalPositionalEmbedding)


@strict
class FactorizedMarianConfig(FactorizedConfig, MarianConfig):
    """Configuration of a Marian whose matrices are held as products.

    The ranks and ``factor_init`` are those of :class:`~hf_fnl.models.configuration.FactorizedConfig`, every other field
    is :class:`MarianConfig`'s. A list of ranks has one for each layer of the encoder, then of the decoder; the rank of
    a decoder's layer is that of its self-attention and of its cross-attention. ``embedding_rank`` is that of all
    embeddings.

    Args:
        normalize_before: Apply LayerNorm where a block begins and after the last layer of encoder and decoder, instead
            of where a block ends. The stock model of such a configuration is Pegasus.

    Raises:
        ValueError: If a rank does not fit the model, ``factor_init`` is unknown, encoder and decoder have different
            numbers of heads, or ``normalize_before`` is set and encoder and decoder do not share their embeddings.
    """

    model_type = "factorized_marian"
    attribute_map: ClassVar[dict[str, str]] = {**MarianConfig.attribute_map, "initializer_range": "init_std"}

    normalize_before: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.encoder_attention_heads != self.decoder_attention_heads:
            raise ValueError(
                "encoder_attention_heads and decoder_attention_heads must be the same, got "
                f"{self.encoder_attention_heads} and {self.decoder_attention_heads}"
            )
        if self.normalize_before and not self.share_encoder_decoder_embeddings:
            raise ValueError(
                "normalize_before=True needs share_encoder_decoder_embeddings=True: no stock model has LayerNorm "
                "before its blocks and separate embeddings"
            )

    def _sizes(self) -> Mapping[str, int]:
        return {
            "hidden_size": self.d_model,
            "num_heads": self.encoder_attention_heads,
            "intermediate_size": min(self.encoder_ffn_dim, self.decoder_ffn_dim),
            "vocab_size": min(self.vocab_size, self.decoder_vocab_size),
            "num_layers": self.first_decoder_layer + self.decoder_layers,
        }

    @property
    def dense_class(self) -> type[PreTrainedConfig]:  # type: ignore[override]
        """Class of the stock configuration."""
        return PegasusConfig if self.normalize_before else MarianConfig

    @property
    def first_decoder_layer(self) -> int:
        """Number of the decoder's first layer in a list of ranks."""
        return self.encoder_layers if self.is_encoder_decoder else 0

    @property
    def shares_embedding(self) -> bool:
        """Whether encoder and decoder look words up in one table."""
        return self.is_encoder_decoder and self.share_encoder_decoder_embeddings and self.tie_word_embeddings

    def of_decoder(self) -> "FactorizedMarianConfig":
        """The configuration of the decoder alone."""
        config, first = copy.deepcopy(self), self.first_decoder_layer
        config.is_decoder, config.is_encoder_decoder = True, False
        config.encoder_layers = self.decoder_layers  # by which Transformers counts the layers of a cache
        for option in config.rank_options():
            if isinstance(ranks := getattr(config, option), list):
                setattr(config, option, ranks[first:])
        return config


class _Heads(FactorizedAttention):
    """Attention whose query-key and output-value products may have different ranks, in the place of a stock one."""

    embed_dim: int
    head_dim: int
    scaling: float
    dropout: float
    layer_idx: int
    config: FactorizedMarianConfig

    def __init__(self, ranks: LayerRanks, dense: stock.MarianAttention) -> None:
        super().__init__(
            dense.embed_dim,
            dense.num_heads,
            dropout=dense.dropout,
            is_decoder=dense.is_decoder,
            is_causal=dense.is_causal,
            config=dense.config,
            layer_idx=dense.layer_idx,
        )
        self.ranks = ranks
        qk, ov = (self.num_heads * (rank or self.head_dim) for rank in (ranks.qk, ranks.ov))
        self.k_proj, self.v_proj, self.q_proj = (HeadProjection(self.embed_dim, width) for width in (qk, ov, qk))
        self.out_proj = HeadProjection(ov, self.embed_dim)

    @staticmethod
    def projections(attention: Any) -> Spans:
        """Query, key, value and output, of our attention or a stock one."""
        return Span(attention.q_proj), Span(attention.k_proj), Span(attention.v_proj), Span(attention.out_proj)

    def draw_heads(self, hidden: int, std: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four dense weights, drawn in the order of the stock model."""
        key, value, query, output = super().draw_heads(hidden, std)
        return query, key, value, output

    def forward(
        self,
        hidden_states: Tensor,
        *,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the stock layer; keys and values of an encoder are computed once and then taken from the cache."""
        states, count = hidden_states if key_value_states is None else key_value_states, self.num_heads
        cache = options.pop(CACHE, None)
        key, value = cached_heads(
            lambda: (split_heads(self.k_proj(states), count), split_heads(self.v_proj(states), count)),
            cache,
            self.layer_idx,
            crossing=key_value_states is not None,
            options=options,
        )
        heads = split_heads(self.q_proj(hidden_states), count), key, value
        context, weights = attend(
            self, stock.eager_attention_forward, heads, attention_mask, dropout=self.dropout, **options
        )
        return self.out_proj(context), weights


class FactorizedMarianAttention(_Heads, stock.MarianAttention):
    """Attention of a Marian with factorized heads."""


class _PreNormAttention(_Heads, pre_norm.PegasusAttention):
    """The same under the class by which Transformers finds the attention weights of a pre-norm model."""


class _Stack(FactorizedBackbone):
    """Mixin before a stock encoder or decoder: its matrices are products, as its configuration says."""

    config: FactorizedMarianConfig
    config_class = FactorizedMarianConfig
    attention_class: ClassVar[type[_Heads]]
    part: ClassVar[str]
    attentions: ClassVar[Mapping[str, str]]  # attentions of a layer, and the parts that they belong to
    layers: Any
    embed_tokens: Any

    def _replace_modules(self) -> None:
        config = self.config
        first = config.first_decoder_layer if self.part == "decoder" else 0
        for number, layer in enumerate(self.layers, first):
            self._replace_in_layer(layer, number)
        self.embed_tokens = _embedding(self.embed_tokens, config, None if config.shares_embedding else self.part)

    def _replace_in_layer(self, layer: nn.Module, number: int) -> None:
        for name, part in self.attentions.items():
            ranks = self.config.ranks.of_layer(number, part)
            if ranks.qk is not None or ranks.ov is not None:
                setattr(layer, name, self.attention_class(ranks, getattr(layer, name)))
        ranks = self.config.ranks.of_layer(number, self.part)
        if ranks.ffn is not None:
            for name in ("fc1", "fc2"):
                dense = getattr(layer, name)
                setattr(layer, name, FactorizedLinear.empty_like(dense, ranks.ffn, init=ranks.init["linear"]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if self.config.shares_embedding and isinstance(module, FactorizedEmbedding) and not is_loaded(module.U):
            # Replaced by the shared factors afterwards; drawn all the same, since the stock model draws it too.
            draw_normal_(module.U.new_empty(module.shape), self.config.init_std)
        else:
            super()._init_weights(module)


class _Encoder(_Stack):
    part = "encoder"
    attentions: ClassVar[Mapping[str, str]] = {"self_attn": "encoder"}


class _Decoder(_Stack):
    part = "decoder"
    attentions: ClassVar[Mapping[str, str]] = {"self_attn": "decoder", "encoder_attn": "cross"}


class FactorizedMarianEncoder(_Encoder, stock.MarianEncoder):
    """The encoder, with LayerNorm after its blocks."""

    attention_class = FactorizedMarianAttention

    @extends(stock.MarianEncoder.forward)
    def forward(self, **inputs: Any) -> Any:
        """As the stock module."""
        return super().forward(**inputs)


class FactorizedMarianDecoder(_Decoder, stock.MarianDecoder):
    """The decoder, with LayerNorm after its blocks."""

    attention_class = FactorizedMarianAttention

    @extends(stock.MarianDecoder.forward)
    def forward(self, **inputs: Any) -> Any:
        """As the stock module."""
        return super().forward(**inputs)


class PreNormMarianEncoder(_Encoder, pre_norm.PegasusEncoder):
    """The encoder, with LayerNorm before its blocks."""

    attention_class = _PreNormAttention

    @extends(pre_norm.PegasusEncoder.forward)
    def forward(self, **inputs: Any) -> Any:
        """As the stock module."""
        return super().forward(**inputs)


class PreNormMarianDecoder(_Decoder, pre_norm.PegasusDecoder):
    """The decoder, with LayerNorm before its blocks."""

    attention_class = _PreNormAttention

    @extends(pre_norm.PegasusDecoder.forward)
    def forward(self, **inputs: Any) -> Any:
        """As the stock module."""
        return super().forward(**inputs)


def encoder_of(config: FactorizedMarianConfig) -> PreTrainedModel:
    """The encoder that a configuration describes."""
    return (PreNormMarianEncoder if config.normalize_before else FactorizedMarianEncoder)(config)


def decoder_of(config: FactorizedMarianConfig) -> PreTrainedModel:
    """The decoder that a configuration describes."""
    return (PreNormMarianDecoder if config.normalize_before else FactorizedMarianDecoder)(config)


def _embedding(
    dense: nn.Embedding, config: FactorizedMarianConfig, part: str | None
) -> nn.Embedding | FactorizedEmbedding:
    """An embedding of a part, or of none, without values: as it is, or held as factors."""
    if config.embedding_rank is None:
        return dense
    return FactorizedEmbedding.empty_like(dense, config.embedding_rank, init=config.ranks.method("embedding", part))


class FactorizedMarianPreTrainedModel(FactorizedPreTrainedModel, stock.MarianPreTrainedModel):
    """What the backbone and the heads share."""

    config: FactorizedMarianConfig
    config_class = FactorizedMarianConfig
    attention_class = FactorizedMarianAttention
    pre_norm_class: ClassVar[type[PreTrainedModel]]  # in the place of `dense_class` with `normalize_before`

    def post_init(self) -> None:
        """As every model does."""
        if self.config.normalize_before:
            self.dense_class = self.pre_norm_class  # type: ignore[misc]
        super().post_init()

    def initialize_weights(self) -> None:
        """As in Transformers, which however forgets on loading that positions are computed and not trained."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, _POSITIONS):
                module.weight.requires_grad_(False)

    @classmethod
    def _shared_ranks(cls, dense: PreTrainedModel) -> Shared:
        prefix = "" if isinstance(dense, stock.MarianModel) else "model."
        encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
        layers = [f"{decoder}.layers.{number}" for number in range(dense.config.decoder_layers)]
        heads = [[f"{layer}.self_attn", f"{layer}.encoder_attn"] for layer in layers]
        embeddings = [f"{decoder}.embed_tokens"]
        if dense.config.is_encoder_decoder:
            first = [f"{encoder}.layers.{number}" for number in range(dense.config.encoder_layers)]
            layers = first + layers
            heads = [[f"{layer}.self_attn"] for layer in first] + heads
            shared = dense.config.share_encoder_decoder_embeddings
            embeddings = [f"{encoder}.embed_tokens"] if shared else [f"{encoder}.embed_tokens", *embeddings]
        return {
            "qk_rank": heads,
            "ov_rank": heads,
            "ffn_rank": [[f"{layer}.fc1", f"{layer}.fc2"] for layer in layers],
            "embedding_rank": [embeddings],
        }


class FactorizedMarianModel(FactorizedMarianPreTrainedModel, stock.MarianModel):
    """Encoder and decoder of Marian with their matrices held as products, as the configuration says."""

    dense_class = stock.MarianModel
    pre_norm_class = pre_norm.PegasusModel

    def __init__(self, config: FactorizedMarianConfig) -> None:
        PreTrainedModel.__init__(self, config)
        if config.share_encoder_decoder_embeddings:
            table = nn.Embedding(config.vocab_size, config.d_model, config.pad_token_id)
            # Where embeddings are not tied, this table is never used and stays as it is.
            self.shared = _embedding(table, config, None) if config.shares_embedding else table
            tied = {f"{part}.embed_tokens.weight": "shared.weight" for part in ("decoder", "encoder")}
            self._tied_weights_keys = tied_factors(tied, config.embedding_rank is not None)
        self.encoder = encoder_of(config)
        self.decoder = decoder_of(config)
        self.post_init()
