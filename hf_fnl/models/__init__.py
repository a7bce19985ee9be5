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
from hf_fnl.models.gpt2 import FactorizedGPT2Config, FactorizedGPT2Model
from hf_fnl.models.gpt2_heads import (
    FactorizedGPT2DoubleHeadsModel,
    FactorizedGPT2ForQuestionAnswering,
    FactorizedGPT2ForSequenceClassification,
    FactorizedGPT2ForTokenClassification,
    FactorizedGPT2LMHeadModel,
)
from hf_fnl.models.marian import FactorizedMarianConfig, FactorizedMarianModel
from hf_fnl.models.marian_heads import FactorizedMarianForCausalLM, FactorizedMarianMTModel

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
    "FactorizedGPT2Config",
    "FactorizedGPT2DoubleHeadsModel",
    "FactorizedGPT2ForQuestionAnswering",
    "FactorizedGPT2ForSequenceClassification",
    "FactorizedGPT2ForTokenClassification",
    "FactorizedGPT2LMHeadModel",
    "FactorizedGPT2Model",
    "FactorizedMarianConfig",
    "FactorizedMarianForCausalLM",
    "FactorizedMarianMTModel",
    "FactorizedMarianModel",
]
