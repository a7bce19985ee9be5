"""Random numbers of a run that goes on, also with another number of processes."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals, set_rng_state_for_device

logger = logging.getLogger(__name__)

# Far apart, so that steps and processes do not meet.
_STRIDE = 1_000_003


def restore_random_numbers(checkpoint: Path, args: TrainingArguments) -> bool:
    """Go on where the random numbers of a process were, if the number of processes changed.

    A process that was not there before starts from a seed of its own, made of ``args.seed``, the step and its number.

    Returns:
        Whether the number of processes changed; nothing was done if not.
    """
    files = {path.stem.rpartition("_")[2]: path for path in checkpoint.glob("rng_state*.pth")}
    saved = max(len(files), 1)
    if saved == args.world_size:
        return False
    number = args.process_index
    path = files.get("state" if saved == 1 else str(number))
    if path is None or number >= saved:
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        seed = (args.seed + _STRIDE * number + step) % 2**32
        set_seed(seed)
        logger.warning(
            "%s has the random numbers of %d processes: process %d of %d starts its own from seed %d",
            checkpoint.name, saved, number, args.world_size, seed,
        )  # fmt: skip
        return True
    _restore(path)
    return True


def _restore(path: Path) -> None:
    with safe_globals():
        state: dict[str, Any] = torch.load(path, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        several = isinstance(state["cuda"], list | tuple)
        set_rng_state_for_device("CUDA", torch.cuda, state, several)
