"""All public names, which ``hf_fnl`` itself has, too. Importing this registers the models with the Auto classes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import hf_fnl.vision.models  # noqa: F401  (registers them)
from hf_fnl.attention import Product, find_products, register_attention
from hf_fnl.layers import FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, TensorizedConv2d
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
    FactorizedGPT2ForQuestionAnswering,
    FactorizedGPT2ForSequenceClassification,
    FactorizedGPT2ForTokenClassification,
    FactorizedGPT2LMHeadModel,
    FactorizedGPT2Model,
    FactorizedLlamaConfig,
    FactorizedLlamaForCausalLM,
    FactorizedLlamaModel,
    FactorizedMarianConfig,
    FactorizedMarianModel,
    FactorizedMarianMTModel,
)
from hf_fnl.models.surgery_loading import load
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.optim.diagnostics import diagnose
from hf_fnl.optim.frobenius_decay import FrobeniusDecay
from hf_fnl.surgery import factorize_, merge_, to_linear_
from hf_fnl.surgery.config import FactorizationConfig, RankRule

if TYPE_CHECKING:
    from hf_fnl.training import DenseThenLowRank, FLAMBeTrainer, FLAMBeTrainingArguments, heal_

# Names that stand elsewhere, by module. Transformers' Trainer imports `datasets`: who only wants a model or an
# optimizer does not wait for it. The others were public in 0.1, whose programs go on.
_ELSEWHERE = {
    "hf_fnl.training": ("DenseThenLowRank", "FLAMBeTrainer", "FLAMBeTrainingArguments", "heal_"),
    "hf_fnl.vision.models": (
        *("CifarResNetConfig", "CifarResNetForImageClassification", "CifarResNetModel", "VGGConfig"),
        *("VGGForImageClassification", "VGGModel", "WideResNetConfig", "WideResNetForImageClassification"),
        *("WideResNetModel", "inner_convolutions", "vision_model"),
    ),
    "hf_fnl.attention": ("AttentionProjections", "Section"),
    "hf_fnl.layers": ("Factorized",),
    "hf_fnl.models": ("FactorizedGPT2DoubleHeadsModel", "FactorizedMarianForCausalLM"),
    "hf_fnl.models.cards": ("model_card",),
    "hf_fnl.surgery": ("Factorization", "restore_"),
}
_MODULES = {name: module for module, names in _ELSEWHERE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'hf_fnl' has no attribute {name!r}")


__all__ = [
    "DenseThenLowRank",
    "FLAMBe",
    "FLAMBeTrainer",
    "FLAMBeTrainingArguments",
    "FactorizationConfig",
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
    "FactorizedMarianMTModel",
    "FactorizedMarianModel",
    "FrobeniusDecay",
    "Lamb",
    "Product",
    "RankRule",
    "TensorizedConv2d",
    "diagnose",
    "factorize_",
    "find_products",
    "heal_",
    "load",
    "merge_",
    "parameter_groups",
    "register_attention",
    "spectral_init",
    "to_linear_",
]
