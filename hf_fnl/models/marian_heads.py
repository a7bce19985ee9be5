"""Every head that Transformers has for Marian, on the factorized backbone, and their registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MarianTokenizer,
    PreTrainedModel,
)
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, Seq2SeqLMOutput
from transformers.models.marian import modeling_marian as stock
from transformers.models.pegasus import modeling_pegasus as pre_norm

from hf_fnl.models.forwards import extends
from hf_fnl.models.marian import (
    FactorizedMarianConfig,
    FactorizedMarianModel,
    FactorizedMarianPreTrainedModel,
    decoder_of,
)
from hf_fnl.models.vocabulary import TiedVocabulary, tied_factors, vocabulary_layer, with_loss


class _WithLMHead(TiedVocabulary, FactorizedMarianPreTrainedModel):
    """A head with vocabulary logits, whose matrix is tied to a word embedding, factor by factor."""

    accepts_loss_kwargs = True

    def _tie_head(self, vocab_size: int, embedding: str, *others: str) -> None:
        """Make the output matrix; ``embedding`` is the name of what it and ``others`` are tied to."""
        config = self.config
        dense = nn.Linear(config.d_model, vocab_size, bias=False)
        self.lm_head = vocabulary_layer(dense, config.embedding_rank, config.ranks.method("embedding"))
        tied = {f"{name}.weight": f"{embedding}.weight" for name in ("lm_head", *others)}
        self._tied_weights_keys = tied_factors(tied, config.embedding_rank is not None)


class FactorizedMarianMTModel(_WithLMHead, stock.MarianMTModel):
    """Translation."""

    dense_class = stock.MarianMTModel
    pre_norm_class = pre_norm.PegasusForConditionalGeneration

    def __init__(self, config: FactorizedMarianConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = FactorizedMarianModel(config)
        shared = config.share_encoder_decoder_embeddings
        vocab_size = config.vocab_size if shared else config.decoder_vocab_size
        self.final_logits_bias = nn.Buffer(torch.zeros(1, vocab_size))
        embeddings = ["model.decoder.embed_tokens", "model.encoder.embed_tokens"]
        self._tie_head(vocab_size, *(["model.shared", *embeddings] if shared else embeddings[:1]))
        self.post_init()

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
        return _with_loss(super().forward(**inputs), labels, num_items_in_batch)


class _DecoderWrapper(FactorizedMarianPreTrainedModel, stock.MarianDecoderWrapper):
    """Holds the decoder under the name that it has in the whole model."""

    dense_class = stock.MarianDecoderWrapper
    pre_norm_class = pre_norm.PegasusDecoderWrapper

    def __init__(self, config: FactorizedMarianConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.decoder = decoder_of(config)
        self.post_init()


class FactorizedMarianForCausalLM(_WithLMHead, stock.MarianForCausalLM):
    """The decoder alone, for left-to-right language modelling. A list of ranks has one for each of its layers."""

    dense_class = stock.MarianForCausalLM
    pre_norm_class = pre_norm.PegasusForCausalLM

    def __init__(self, config: FactorizedMarianConfig) -> None:
        config = config.of_decoder()
        PreTrainedModel.__init__(self, config)
        self.model = _DecoderWrapper(config)
        self._tie_head(config.vocab_size, "model.decoder.embed_tokens")
        self.post_init()

    @extends(stock.MarianForCausalLM.forward)
    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> CausalLMOutputWithCrossAttentions:
        """As the stock model, with a loss that adds up over parts of a batch.

        Args:
            labels: ``(batch, length)``, not shifted inside, -100 where nothing is to be predicted.
            num_items_in_batch: As in :meth:`FactorizedMarianMTModel.forward`.
        """
        return _with_loss(super().forward(**inputs), labels, num_items_in_batch)


def _with_loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Any:
    if labels is None:
        return outputs
    logits = outputs.logits.flatten(0, -2).float()
    return with_loss(outputs, fixed_cross_entropy(logits, labels.flatten(), num_items_in_batch))


AutoConfig.register(FactorizedMarianConfig.model_type, FactorizedMarianConfig, exist_ok=True)
AutoTokenizer.register(FactorizedMarianConfig, tokenizer_class=MarianTokenizer, exist_ok=True)
for _auto, _model in (
    (AutoModel, FactorizedMarianModel),
    (AutoModelForSeq2SeqLM, FactorizedMarianMTModel),
    (AutoModelForCausalLM, FactorizedMarianForCausalLM),
):
    _auto.register(FactorizedMarianConfig, _model, exist_ok=True)
