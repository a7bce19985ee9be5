"""What of a checkpoint is different under DeepSpeed and FSDP, which are known by their attributes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_fnl.training.checkpoints.contents import aliases

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
_SCALE = ("cur_scale", "cur_iter", "cur_hysteresis", "last_overflow_iter")


def counters_of(engine: Any) -> dict[str, Any]:
    """What DeepSpeed's engine counts, and its loss scale; empty for other engines."""
    scaler = getattr(getattr(engine, "optimizer", None), "loss_scaler", None)
    counters = {name: getattr(engine, name) for name in _COUNTERS if isinstance(getattr(engine, name, None), int)}
    scale = {name: getattr(scaler, name) for name in _SCALE if isinstance(getattr(scaler, name, None), int | float)}
    return {"counters": counters, "scale": scale}


def restore_counters(saved: dict[str, Any], engine: Any) -> None:
    """Let DeepSpeed's engine go on counting; nothing is done for other engines."""
    now = counters_of(engine)
    for name in now["counters"].keys() & saved["counters"].keys():
        setattr(engine, name, saved["counters"][name])
    for name in now["scale"].keys() & saved["scale"].keys():
        setattr(engine.optimizer.loss_scaler, name, saved["scale"][name])


def forget_old_names_(model: nn.Module) -> None:
    """Have weights saved under the names that the model gives them, by which checkpoints are put back.

    Transformers undoes in saving how it renamed the weights of an old checkpoint (``LayerNorm.gamma``) in loading, and
    under ZeRO-3 also where it had nothing to rename.
    """
    noted = getattr(model, "_weight_conversions", None)
    if noted is not None:
        old = [each.source_patterns for each in get_checkpoint_conversion_mapping("legacy")]
        model._weight_conversions = [each for each in noted if each.source_patterns not in old]  # type: ignore[assignment]


def whole_state_dict(trainer: Any) -> dict[str, Tensor] | None:
    """The weights of a model that an engine holds, on the first process; ``None`` if no engine does.

    All processes must call this. Others than the first may get an empty dictionary.
    """
    engine = trainer.model_wrapped
    if trainer.is_deepspeed_enabled and hasattr(engine, "zero_optimization_stage"):
        if engine.zero_optimization_stage() == 3:  # also where the config does not say that weights are to be gathered
            weights = engine._zero3_consolidated_16bit_state_dict() or {}
        else:
            weights = trainer.accelerator.get_state_dict(engine)
    elif trainer.is_fsdp_enabled and engine is trainer.model:
        weights = trainer.accelerator.get_state_dict(engine)
    else:
        return None
    for first, *others in aliases(trainer.accelerator.unwrap_model(trainer.model)).values():
        # Tied weights were copied one by one; Transformers saves those once that share their memory.
        weights.update({name: weights[first] for name in others if name in weights and first in weights})
    return weights
