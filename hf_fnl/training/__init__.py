"""Training with Transformers' Trainer."""

from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DiagnosticsCallback
from hf_fnl.training.trainer import FLAMBeTrainer, build_optimizer

__all__ = ["DiagnosticsCallback", "FLAMBeTrainer", "FLAMBeTrainingArguments", "build_optimizer"]
