"""Factorized model families, registered with Transformers' Auto classes when imported."""

from hf_fnl.models.bert import (
    FactorizedBertConfig,
    FactorizedBertForMaskedLM,
    FactorizedBertForMultipleChoice,
    FactorizedBertForNextSentencePrediction,
    FactorizedBertForPreTraining,
    FactorizedBertForQuestionAnswering,
    FactorizedBertForSequenceClassification,
    FactorizedBertForTokenClassification,
    FactorizedBertLMHeadModel,
    FactorizedBertModel,
)
from hf_fnl.models.gpt2 import (
    FactorizedGPT2Config,
    FactorizedGPT2DoubleHeadsModel,
    FactorizedGPT2ForQuestionAnswering,
    FactorizedGPT2ForSequenceClassification,
    FactorizedGPT2ForTokenClassification,
    FactorizedGPT2LMHeadModel,
    FactorizedGPT2Model,
)
from hf_fnl.models.llama import FactorizedLlamaConfig, FactorizedLlamaForCausalLM, FactorizedLlamaModel
from hf_fnl.models.marian import (
    FactorizedMarianConfig,
    FactorizedMarianForCausalLM,
    FactorizedMarianModel,
    FactorizedMarianMTModel,
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
    "FactorizedGPT2Config",
    "FactorizedGPT2DoubleHeadsModel",
    "FactorizedGPT2ForQuestionAnswering",
    "FactorizedGPT2ForSequenceClassification",
    "FactorizedGPT2ForTokenClassification",
    "FactorizedGPT2LMHeadModel",
    "FactorizedGPT2Model",
    "FactorizedLlamaConfig",
    "FactorizedLlamaForCausalLM",
    "FactorizedLlamaModel",
    "FactorizedMarianConfig",
    "FactorizedMarianForCausalLM",
    "FactorizedMarianMTModel",
    "FactorizedMarianModel",
]
