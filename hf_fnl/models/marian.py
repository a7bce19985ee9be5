"""Factorized Marian: its configuration, backbone and every head that Transformers has for Marian."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

import copy
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import MarianConfig, MarianTokenizer, PegasusConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, Seq2SeqLMOutput
from transformers.models.marian import modeling_marian as stock
from transformers.models.pegasus import modeling_pegasus as pre_norm

from hf_fnl.models.base import FactorizedPreTrainedModel, as_class
from hf_fnl.models.configuration import NarrowHeadsConfig
from hf_fnl.models.cuts import Names
from hf_fnl.models.forwards import extends
from hf_fnl.models.losses import masked_lm_loss
from hf_fnl.models.register import register

# Transformers has a Marian with LayerNorm before its blocks under another name; modules have the same parameters.
_PRE_NORM: dict[Any, Any] = {
    stock.MarianEncoder: pre_norm.PegasusEncoder,
    stock.MarianDecoder: pre_norm.PegasusDecoder,
    stock.MarianEncoderLayer: pre_norm.PegasusEncoderLayer,
    stock.MarianDecoderLayer: pre_norm.PegasusDecoderLayer,
    stock.MarianAttention: pre_norm.PegasusAttention,
    stock.MarianSinusoidalPositionalEmbedding: pre_norm.PegasusSinusoidalPositionalEmbedding,
}
_PRE_NORM_MODELS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    stock.MarianModel: pre_norm.PegasusModel,
    stock.MarianMTModel: pre_norm.PegasusForConditionalGeneration,
    stock.MarianForCausalLM: pre_norm.PegasusForCausalLM,
}
_POSITIONS = (stock.MarianSinusoidalPositionalEmbedding, pre_norm.PegasusSinusoidalPositionalEmbedding)


@strict
class FactorizedMarianConfig(NarrowHeadsConfig, MarianConfig):
    """Configuration of a Marian whose matrices are held as factors.

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

    @property
    def feed_forward_size(self) -> int:
        """Width inside of a feed-forward block, of encoder or decoder."""
        return min(self.encoder_ffn_dim, self.decoder_ffn_dim)

    @property
    def smallest_vocabulary(self) -> int:
        """Rows of the smaller word embedding."""
        return min(self.vocab_size, self.decoder_vocab_size)

    @property
    def num_layers_of_ranks(self) -> int:
        """Entries of a list of ranks."""
        return self.first_decoder_layer + self.decoder_layers

    @property
    def dense_class(self) -> type[PreTrainedConfig]:  # type: ignore[override]
        """Class of the stock configuration."""
        return PegasusConfig if self.normalize_before else MarianConfig

    @property
    def first_decoder_layer(self) -> int:
        """Number of the decoder's first layer in a list of ranks."""
        return self.encoder_layers if self.is_encoder_decoder else 0

    def of_decoder(self) -> "FactorizedMarianConfig":
        """Return the configuration of the decoder alone."""
        config, first = copy.deepcopy(self), self.first_decoder_layer
        config.is_decoder, config.is_encoder_decoder = True, False
        config.encoder_layers = self.decoder_layers  # by which Transformers counts the layers of a cache
        for option in config.rank_options():
            if isinstance(ranks := getattr(config, option), list):
                setattr(config, option, ranks[first:])
        return config


class FactorizedMarianPreTrainedModel(FactorizedPreTrainedModel):
    """Base class of the backbone and the heads."""

    config_class = FactorizedMarianConfig
    names = Names(
        attention=("encoder.layers.*.self_attn", "decoder.layers.*.self_attn", "decoder.layers.*.encoder_attn"),
        ffn=("encoder.layers.*.fc1", "encoder.layers.*.fc2", "decoder.layers.*.fc1", "decoder.layers.*.fc2"),
        embedding=("encoder.embed_tokens", "decoder.embed_tokens"),
    )

    def post_init(self) -> None:
        """As every model does."""
        if self.config.normalize_before:
            self.dense_class = _PRE_NORM_MODELS.get(self.dense_class, self.dense_class)  # type: ignore[misc]
            for module in list(self.modules()):
                for name, child in module.named_children():
                    if type(child) in (stock.MarianEncoder, stock.MarianDecoder):
                        child.layer_norm = nn.LayerNorm(self.config.d_model)
                        setattr(module, name, as_class(child, _PRE_NORM[type(child)]))
                    else:
                        child.__class__ = _PRE_NORM.get(type(child), type(child))
        super().post_init()

    def initialize_weights(self) -> None:
        """As in Transformers, which however forgets on loading that positions are computed and not trained."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, _POSITIONS):
                module.weight.requires_grad_(False)

    def layer_number(self, name: str, number: int) -> int:
        """Return the place in a list of ranks, where the decoder's follow the encoder's."""
        return number + self.config.first_decoder_layer * name.startswith("decoder.layers.")


class FactorizedMarianModel(FactorizedMarianPreTrainedModel, stock.MarianModel):
    """Encoder and decoder of Marian with their matrices held as factors, as the configuration says."""


FactorizedMarianPreTrainedModel.backbone_class = FactorizedMarianModel


class FactorizedMarianMTModel(FactorizedMarianPreTrainedModel, stock.MarianMTModel):
    """Translation."""

    accepts_loss_kwargs = True

    @extends(stock.MarianMTModel.forward)
    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> Seq2SeqLMOutput:
        """As the stock model, with a loss that adds up over parts of a batch.

        Args:
            labels: ``(batch, length)``, -100 where nothing is to be predicted.
            num_items_in_batch: Labelled positions in the whole batch, as the Trainer passes it; their own number
                unless given.
        """
        if labels is not None:
            inputs["use_cache"] = False
            if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
                inputs["decoder_input_ids"] = self.prepare_decoder_input_ids_from_labels(labels)
        return _with_loss(super().forward(**inputs, return_dict=True), labels, num_items_in_batch)


class FactorizedMarianForCausalLM(FactorizedMarianPreTrainedModel, stock.MarianForCausalLM):
    """The decoder alone, for left-to-right language modelling. A list of ranks has one for each of its layers."""

    accepts_loss_kwargs = True

    def __init__(self, config: FactorizedMarianConfig) -> None:
        super().__init__(config.of_decoder())

    @extends(stock.MarianForCausalLM.forward)
    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> CausalLMOutputWithCrossAttentions:
        """As the stock model, with a loss that adds up over parts of a batch.

        Args:
            labels: ``(batch, length)``, not shifted inside, -100 where nothing is to be predicted.
            num_items_in_batch: As in :meth:`FactorizedMarianMTModel.forward`.
        """
        return _with_loss(super().forward(**inputs, return_dict=True), labels, num_items_in_batch)


def _with_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Any:
    if labels is None:
        return outputs
    return type(outputs)(loss=masked_lm_loss(outputs.logits, labels, num_items_in_batch), **outputs)


register(
    FactorizedMarianConfig,
    MarianTokenizer,
    AutoModel=FactorizedMarianModel,
    AutoModelForSeq2SeqLM=FactorizedMarianMTModel,
    AutoModelForCausalLM=FactorizedMarianForCausalLM,
)
