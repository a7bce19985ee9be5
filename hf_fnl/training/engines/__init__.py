"""The engines that share a training among processes: DDP, FSDP2 and DeepSpeed's ZeRO."""

from hf_fnl.training.engines.checks import check_engine, check_optimizer, innermost, is_sharded
from hf_fnl.training.engines.handover import let_go, ties_in_one_unit, whole_parameters
from hf_fnl.training.engines.trainer import EngineTrainer

__all__ = [
    "EngineTrainer",
    "check_engine",
    "check_optimizer",
    "innermost",
    "is_sharded",
    "let_go",
    "ties_in_one_unit",
    "whole_parameters",
]
