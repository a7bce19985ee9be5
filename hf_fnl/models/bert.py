"""Factorized BERT: its configuration, backbone and every head that Transformers has for BERT."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert import modeling_bert as stock

from hf_fnl.math.vocabulary_loss import IGNORE_INDEX
from hf_fnl.models.base import FactorizedPreTrainedModel, is_loaded
from hf_fnl.models.configuration import NarrowHeadsConfig
from hf_fnl.models.cuts import Names
from hf_fnl.models.forwards import extends
from hf_fnl.models.losses import masked_lm_loss, next_sentence_loss
from hf_fnl.models.register import register


@strict
class FactorizedBertConfig(NarrowHeadsConfig, BertConfig):
    """Configuration of a BERT whose matrices are held as factors.

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


class FactorizedBertPreTrainedModel(FactorizedPreTrainedModel):
    """Base class of the backbone and the heads."""

    config_class = FactorizedBertConfig
    # Most stock heads return the mean over their own batch, whatever the number of items that the Trainer passes.
    accepts_loss_kwargs = False
    names = Names(
        attention=("encoder.layer.*.attention", "encoder.layer.*.crossattention"),
        ffn=("encoder.layer.*.intermediate.dense", "encoder.layer.*.output.dense"),
        embedding=("embeddings.word_embeddings",),
    )


class FactorizedBertModel(FactorizedBertPreTrainedModel, stock.BertModel):
    """The backbone of BERT with its matrices held as factors, as its configuration says."""


FactorizedBertPreTrainedModel.backbone_class = FactorizedBertModel


class _WithLMHead(FactorizedBertPreTrainedModel):
    """A head with vocabulary logits."""

    cls: Any
    accepts_loss_kwargs = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        bias = self.cls.predictions.bias
        if module is self.cls.predictions and is_loaded(bias):
            init.copy_(module.decoder.bias, bias)  # untied, in a checkpoint of version 0.1: it has this bias only

    def _to_predict(self, labels: Tensor | None, states: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return labels and states ``(batch, length, ...)``, at the labelled positions only where that is enough."""
        if labels is None or not (self.training and self.config.sparse_prediction):
            return labels, states
        labelled = labels != IGNORE_INDEX
        return labels[labelled], states[labelled]


class FactorizedBertForPreTraining(_WithLMHead, stock.BertForPreTraining):
    """Masked language modelling and next-sentence prediction."""

    @extends(stock.BertForPreTraining.forward)
    def forward(
        self,
        *,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_sequences_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> stock.BertForPreTrainingOutput:
        """As the stock model, with a loss that adds up over parts of a batch.

        Args:
            labels: ``(batch, length)``, -100 where nothing is to be predicted.
            next_sentence_label: ``(batch,)``, 0 where B follows A and 1 where it is random.
            num_items_in_batch: Labelled positions in the whole batch, as the Trainer passes it.
            num_sequences_in_batch: Sequences in the whole batch. Without it each part's next-sentence loss weighs as
                much as its labelled positions.

        Returns:
            The stock output. ``prediction_logits`` are ``(labelled positions, vocab_size)`` in training with
            ``sparse_prediction``, else ``(batch, length, vocab_size)``.
        """
        outputs = self.bert(**inputs)
        labels, states = self._to_predict(labels, outputs.last_hidden_state)
        logits, relationship = self.cls(states, outputs.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            share = 1.0 if num_items_in_batch is None else (labels >= 0).sum() / num_items_in_batch
            loss = masked_lm_loss(logits, labels, num_items_in_batch)
            loss = loss + next_sentence_loss(relationship, next_sentence_label, num_sequences_in_batch, share)
        return stock.BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=relationship,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FactorizedBertForMaskedLM(_WithLMHead, stock.BertForMaskedLM):
    """Masked language modelling."""

    @extends(stock.BertForMaskedLM.forward)
    def forward(
        self, *, labels: Tensor | None = None, num_items_in_batch: Tensor | int | None = None, **inputs: Any
    ) -> MaskedLMOutput:
        """As the stock model, with a loss that adds up over parts of a batch.

        Args:
            labels: ``(batch, length)``, -100 where nothing is to be predicted.
            num_items_in_batch: Labelled positions in the whole batch, as the Trainer passes it.

        Returns:
            The stock output. ``logits`` are ``(labelled positions, vocab_size)`` in training with
            ``sparse_prediction``, else ``(batch, length, vocab_size)``.
        """
        outputs = self.bert(**inputs)
        labels, states = self._to_predict(labels, outputs.last_hidden_state)
        logits = self.cls(states)
        return MaskedLMOutput(
            loss=None if labels is None else masked_lm_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class FactorizedBertLMHeadModel(_WithLMHead, stock.BertLMHeadModel):
    """Left-to-right language modelling, for a configuration with ``is_decoder=True``."""


class FactorizedBertForNextSentencePrediction(FactorizedBertPreTrainedModel, stock.BertForNextSentencePrediction):
    """Next-sentence prediction alone."""


class FactorizedBertForSequenceClassification(FactorizedBertPreTrainedModel, stock.BertForSequenceClassification):
    """Classification or regression of a sequence or a pair, as for GLUE."""


class FactorizedBertForMultipleChoice(FactorizedBertPreTrainedModel, stock.BertForMultipleChoice):
    """Choice among several sequences, as for SWAG."""


class FactorizedBertForTokenClassification(FactorizedBertPreTrainedModel, stock.BertForTokenClassification):
    """Classification of every token, as for named entities."""


class FactorizedBertForQuestionAnswering(FactorizedBertPreTrainedModel, stock.BertForQuestionAnswering):
    """Extractive question answering, as for SQuAD."""


register(
    FactorizedBertConfig,
    BertTokenizer,
    AutoModel=FactorizedBertModel,
    AutoModelForPreTraining=FactorizedBertForPreTraining,
    AutoModelForMaskedLM=FactorizedBertForMaskedLM,
    AutoModelForCausalLM=FactorizedBertLMHeadModel,
    AutoModelForNextSentencePrediction=FactorizedBertForNextSentencePrediction,
    AutoModelForSequenceClassification=FactorizedBertForSequenceClassification,
    AutoModelForMultipleChoice=FactorizedBertForMultipleChoice,
    AutoModelForTokenClassification=FactorizedBertForTokenClassification,
    AutoModelForQuestionAnswering=FactorizedBertForQuestionAnswering,
)
