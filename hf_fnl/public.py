"""All public names, which ``hf_fnl`` itself has, too. Importing this registers the models with the Auto classes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_fnl.attention import AttentionProjections, Product, Section, find_products, register_attention
from hf_fnl.layers import (
    Factorized,
    FactorizedConv2d,
    FactorizedEmbedding,
    FactorizedLinear,
    TensorizedConv2d,
    keep_narrow,
)
from hf_fnl.math.spectral import spectral_init
from hf_fnl.models import (
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
    FactorizedGPT2Config,
    FactorizedGPT2DoubleHeadsModel,
    FactorizedGPT2ForQuestionAnswering,
    FactorizedGPT2ForSequenceClassification,
    FactorizedGPT2ForTokenClassification,
    FactorizedGPT2LMHeadModel,
    FactorizedGPT2Model,
    FactorizedLlamaConfig,
    FactorizedLlamaForCausalLM,
    FactorizedLlamaModel,
    FactorizedMarianConfig,
    FactorizedMarianForCausalLM,
    FactorizedMarianModel,
    FactorizedMarianMTModel,
)
from hf_fnl.models.cards import model_card
from hf_fnl.models.checkpoint import load
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.optim.diagnostics import diagnose
from hf_fnl.optim.frobenius_decay import FrobeniusDecay
from hf_fnl.surgery import Factorization, factorize_, merge_, restore_
from hf_fnl.surgery.config import FactorizationConfig, RankRule
from hf_fnl.vision.models import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    CifarResNetModel,
    VGGConfig,
    VGGForImageClassification,
    VGGModel,
    WideResNetConfig,
    WideResNetForImageClassification,
    WideResNetModel,
    inner_convolutions,
    vision_model,
)

if TYPE_CHECKING:
    from hf_fnl.training import DenseThenLowRank, FLAMBeTrainer, FLAMBeTrainingArguments, match_checkpoint_

# Transformers' Trainer imports `datasets`; who only wants a model or an optimizer does not wait for it.
_LAZY = dict.fromkeys(
    ("DenseThenLowRank", "FLAMBeTrainer", "FLAMBeTrainingArguments", "match_checkpoint_"), "hf_fnl.training"
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hf_fnl' has no attribute {name!r}")


__all__ = [
    "AttentionProjections",
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "CifarResNetModel",
    "DenseThenLowRank",
    "FLAMBe",
    "FLAMBeTrainer",
    "FLAMBeTrainingArguments",
    "Factorization",
    "FactorizationConfig",
    "Factorized",
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
    "FactorizedConv2d",
    "FactorizedEmbedding",
    "FactorizedGPT2Config",
    "FactorizedGPT2DoubleHeadsModel",
    "FactorizedGPT2ForQuestionAnswering",
    "FactorizedGPT2ForSequenceClassification",
    "FactorizedGPT2ForTokenClassification",
    "FactorizedGPT2LMHeadModel",
    "FactorizedGPT2Model",
    "FactorizedLinear",
    "FactorizedLlamaConfig",
    "FactorizedLlamaForCausalLM",
    "FactorizedLlamaModel",
    "FactorizedMarianConfig",
    "FactorizedMarianForCausalLM",
    "FactorizedMarianMTModel",
    "FactorizedMarianModel",
    "FrobeniusDecay",
    "Lamb",
    "Product",
    "RankRule",
    "Section",
    "TensorizedConv2d",
    "VGGConfig",
    "VGGForImageClassification",
    "VGGModel",
    "WideResNetConfig",
    "WideResNetForImageClassification",
    "WideResNetModel",
    "diagnose",
    "factorize_",
    "find_products",
    "inner_convolutions",
    "keep_narrow",
    "load",
    "match_checkpoint_",
    "merge_",
    "model_card",
    "parameter_groups",
    "register_attention",
    "restore_",
    "spectral_init",
    "vision_model",
]
