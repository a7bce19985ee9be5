"""What the tests of checkpoints and their worker processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine_cases import ENGINES
from training_cases import tiny_model, tiny_trainer

from hf_fnl import FLAMBeTrainer

SAVED, STEPS = 3, 5
BATCH = 8


def checkpoint_trainer(folder: Path, engine: str, world_size: int, **options: Any) -> FLAMBeTrainer:
    """A trainer of the tiny problem under an engine that saves at step ``SAVED``, with the same batches everywhere."""
    batch = {"per_device_train_batch_size": BATCH // world_size, "max_steps": STEPS}
    save = {"save_strategy": "steps", "save_steps": SAVED, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    options = {**batch, **save, **ENGINES[engine], **options}
    if engine == "hsdp":
        from accelerate.parallelism_config import ParallelismConfig

        options["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=world_size // 2)
    return tiny_trainer(folder, tiny_model(), **options)
