"""Making the folder of a model of a checkpoint whose weights were saved in parts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_fnl.training.checkpoints.collecting import OPTIMIZER_FILE, opened
from hf_fnl.training.checkpoints.contents import WEIGHT
from hf_fnl.training.checkpoints.manifest import MANIFEST_FILE, fault
from hf_fnl.training.checkpoints.pieces import PIECES_FILES, Pieces
from hf_fnl.utils.files import write_json

# What belongs to the training, not to the model.
_LEFT = (
    *(MANIFEST_FILE, OPTIMIZER_FILE, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME),
    *("rng_state*.pth", "scaler.pt", "optimizer.pt", PIECES_FILES, "*.safetensors", SAFE_WEIGHTS_INDEX_NAME),
)


def consolidate(checkpoint: Path, folder: Path, *, file_bytes: int = 5 * 10**9) -> dict[str, Any]:
    """Write a model's folder, for ``from_pretrained``, from a checkpoint, with no more than one file in memory.

    Args:
        checkpoint: Written by a run with ``checkpoint_format=sharded``; one with whole weights will do too.
        folder: To write to; exists.
        file_bytes: Size from which the weights are cut into several files.

    Returns:
        The number of tensors, their bytes and the files.

    Raises:
        OSError: If something cannot be read or written.
        ValueError: If the checkpoint is not whole or holds no weights.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"there is no folder {checkpoint}")
    if (told := fault(checkpoint)) is not None:
        raise ValueError(f"the checkpoint {checkpoint} is not whole: {told}")
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*_LEFT), dirs_exist_ok=True)
    with opened(checkpoint) as stored:
        files = list(_files(stored, file_bytes))
        if not files:
            raise ValueError(f"{checkpoint} holds no weights")
        names = _file_names(len(files))
        for name, keys in zip(names, files, strict=True):
            tensors = {_name(key): stored.read(key).view(stored.shapes[key]) for key in keys}
            save_file(tensors, folder / name, metadata={"format": "pt"})
        total = sum(_bytes(stored, key) for keys in files for key in keys)
    if len(files) > 1:
        weight_map = {_name(key): name for name, keys in zip(names, files, strict=True) for key in keys}
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return {"tensors": sum(map(len, files)), "bytes": total, "files": names}


def _files(stored: Pieces, file_bytes: int) -> Iterator[list[str]]:
    """The keys of the weights, file by file."""
    keys: list[str] = []
    size = 0
    for key in (key for key in stored if key.startswith(f"{WEIGHT}/")):
        if keys and size + _bytes(stored, key) > file_bytes:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += _bytes(stored, key)
    if keys:
        yield keys


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SAFE_WEIGHTS_NAME]
    stem, _, suffix = SAFE_WEIGHTS_NAME.rpartition(".")
    return [f"{stem}-{number:05}-of-{count:05}.{suffix}" for number in range(1, count + 1)]


def _name(key: str) -> str:
    return key.removeprefix(f"{WEIGHT}/")


def _bytes(stored: Pieces, key: str) -> int:
    return math.prod(stored.shapes[key]) * stored.dtype(key).itemsize
