"""Training with Transformers' Trainer."""

import logging

from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DiagnosticsCallback
from hf_fnl.training.form import match_checkpoint_
from hf_fnl.training.healing import DistillationTrainer, heal_
from hf_fnl.training.low_rank_phase import DenseThenLowRank
from hf_fnl.training.optimizers import build_optimizer
from hf_fnl.training.trainer import FLAMBeTrainer

__all__ = [
    "DenseThenLowRank",
    "DiagnosticsCallback",
    "DistillationTrainer",
    "FLAMBeTrainer",
    "FLAMBeTrainingArguments",
    "build_optimizer",
    "heal_",
    "match_checkpoint_",
]

# accelerate imports DeepSpeed, where it is installed, whenever it unwraps a model; on importing, DeepSpeed says on
# stdout which device it would use. Nobody has asked, and what it warns of later is not held back.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
