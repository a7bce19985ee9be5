"""The folders of checkpoints in that of a run: they appear at once, whole, and vanish at once.

A checkpoint is written under a hidden name and renamed when all of it is on disk. One that is to go is renamed first.
So whatever is named ``checkpoint-N`` is whole, or was damaged by others.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fnl.training.checkpoints.manifest import MANIFEST_FILE, fault
from hf_fnl.utils.files import flush

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_LEFTOVER = re.compile(rf"\.({PREFIX_CHECKPOINT_DIR}-\d+)\.(unfinished|removed)")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def unfinished_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is written."""
    return checkpoint.with_name(f".{checkpoint.name}.unfinished")


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints in the folder of a run, oldest step first."""
    found = {path: _NAME.fullmatch(path.name) for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()}
    steps = {path: int(match[1]) for path, match in found.items() if match}
    return sorted(steps, key=steps.__getitem__)


def publish(checkpoint: Path) -> None:
    """Give a checkpoint that is written, manifest and all, its name; another one of that name goes."""
    if checkpoint.exists():
        remove(checkpoint)
    unfinished_folder(checkpoint).rename(checkpoint)
    flush(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; at no moment does a part of it have its name."""
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def clean(run: Path) -> None:
    """Remove what a run that was killed left half written or half removed; what only lacks its name gets it."""
    for path in sorted(run.glob(f".{PREFIX_CHECKPOINT_DIR}-*")) if run.is_dir() else ():
        if (match := _LEFTOVER.fullmatch(path.name)) is None:
            continue
        checkpoint = run / match[1]
        written = match[2] == "unfinished" and (path / MANIFEST_FILE).is_file() and fault(path) is None
        if written and not checkpoint.exists():
            publish(checkpoint)
        else:
            shutil.rmtree(path, ignore_errors=True)


def rotate(run: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Remove the checkpoints that were written first, so that ``limit`` stay.

    Args:
        run: Folder of the run.
        limit: How many may stay; ``None`` or 0 for all.
        keep: Stay in any case.
    """
    if not limit:
        return
    found = checkpoints(run)
    others = sorted((path for path in found if path not in keep), key=lambda path: path.stat().st_mtime_ns)
    for path in others[: max(0, len(found) - limit)]:
        remove(path)
