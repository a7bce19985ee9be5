"""Factorized model families, registered with Transformers' Auto classes when imported."""

from hf_fnl.models.bert import FactorizedBertConfig, FactorizedBertModel
from hf_fnl.models.bert_heads import (
    FactorizedBertForMaskedLM,
    FactorizedBertForMultipleChoice,
    FactorizedBertForNextSentencePrediction,
    FactorizedBertForPreTraining,
    FactorizedBertForQuestionAnswering,
    FactorizedBertForSequenceClassification,
    FactorizedBertForTokenClassification,
    FactorizedBertLMHeadModel,
)

__all__ = [
    "FactorizedBertConfig",
    "FactorizedBertForMaskedLM",
    "FactorizedBertForMultipleChoice",
    "FactorizedBertForNextSentencePrediction",
    "FactorizedBertForPreTraining",
    "FactorizedBertForQuestionAnswering",
    "FactorizedBertForSequenceClassification",
    "FactorizedBertForTokenClassification",
    "FactorizedBertLMHeadModel",
    "FactorizedBertModel",
]
