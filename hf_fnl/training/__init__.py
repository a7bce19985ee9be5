"""Training with Transformers' Trainer."""

from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DiagnosticsCallback
from hf_fnl.training.form import take_form_
from hf_fnl.training.low_rank_phase import DenseThenLowRank
from hf_fnl.training.trainer import FLAMBeTrainer, build_optimizer

__all__ = [
    "DenseThenLowRank",
    "DiagnosticsCallback",
    "FLAMBeTrainer",
    "FLAMBeTrainingArguments",
    "build_optimizer",
    "take_form_",
]
