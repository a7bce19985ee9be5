"""Checkpoints of Transformers' Trainer that are known to be complete: each gets a list of its files, written last."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint import CheckpointException
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fnl.training.engines import innermost
from hf_fnl.training.manifest import MANIFEST_FILE, fault, is_unfinished, mark_of, write_manifest
from hf_fnl.utils.files import flush
from hf_fnl.utils.processes import first_decides, is_first, process

logger = logging.getLogger(__name__)

_FULL = 1 << 16  # bytes that may be left on a disk that is full
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class CompleteCheckpoints(TrainerCallback):
    """Writes the list of the files of a checkpoint when all processes have written theirs, and removes older ones.

    Any Trainer may have this callback. That of Transformers removes older checkpoints before the new one is known to be
    complete, and goes by the clock: within :meth:`training` this callback does it instead.

    Args:
        limit: Checkpoints that stay, beside the best one; ``None`` for all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.unfinished: Path | None = None
        self.written: set[Path] = set()

    @contextlib.contextmanager
    def training(self, args: TrainingArguments) -> Iterator[None]:
        """While a Trainer trains: ``save_total_limit`` is the limit here, and what could not be written is removed.

        Raises:
            RuntimeError: If a checkpoint could not be written.
        """
        self.unfinished, self.limit = None, args.save_total_limit
        try:
            yield
        except (Exception, CheckpointException) as error:  # the latter is of torch's shards, and no Exception
            if self.unfinished is None:
                raise
            reason = _reason(error, self.unfinished.parent)
            with contextlib.suppress(OSError):
                remove(self.unfinished)
            raise RuntimeError(
                f"could not write {self.unfinished}: {reason}; earlier checkpoints are as they were"
            ) from error
        finally:
            args.save_total_limit = self.limit

    def begin(self, checkpoint: Path) -> None:
        """Note that a checkpoint is about to be written; what is left of one of that name goes. For all processes."""

        def make() -> None:
            if checkpoint.exists():
                remove(checkpoint)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            mark_of(checkpoint).touch()
            flush(checkpoint.parent)
            checkpoint.mkdir()

        first_decides(make)
        self.unfinished = checkpoint

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """List the files."""
        checkpoint = self.unfinished or checkpoint_folder(Path(args.output_dir), state.global_step)
        write_manifest(checkpoint, optimizer=type(innermost(optimizer)).__name__, processes=process()[1])
        self.written.add(checkpoint)
        self.unfinished = None
        if self.limit is not None:
            args.save_total_limit = self.limit
        if is_first():
            self._rotate(checkpoint, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """List the files of a checkpoint of which nothing was said: ``enable_jit_checkpoint`` saves them so."""
        if self.unfinished is not None:
            self.on_save(args, state, control, **kwargs)

    on_step_begin = on_pre_optimizer_step = on_epoch_end = on_step_end

    def _rotate(self, newest: Path, state: TrainerState) -> None:
        """Remove the checkpoints of the earliest steps; what lies ahead was left behind by an earlier attempt."""
        if not self.limit or self.limit < 1:
            return
        found = checkpoints(newest.parent)
        kept = {newest, *([Path(state.best_model_checkpoint)] if state.best_model_checkpoint else [])}
        others = [path for path in found if path not in kept]
        others.sort(key=lambda path: (_step(path) <= state.global_step, _step(path)))
        for path in others[: max(0, len(found) - max(self.limit, len(kept)))]:
            remove(path)


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in the folder of a run, oldest step first."""
    found = (path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return sorted(filter(lambda path: _NAME.fullmatch(path.name), found), key=_step)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; at no moment does a part of it have its name."""
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    mark_of(checkpoint).unlink(missing_ok=True)
    shutil.rmtree(removed, ignore_errors=True)


def newest_complete(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, the same in all processes, which must all call this.

    Newer ones that are skipped are logged with the reason.

    Returns:
        The checkpoint; ``None`` if there is none but such as were never finished.

    Raises:
        ValueError: If there are damaged checkpoints and none is complete.
    """
    skipped = []
    for checkpoint in reversed(first_decides(lambda: checkpoints(run))):
        if (told := fault(checkpoint)) is None:
            return checkpoint
        if is_first():
            logger.warning("skipped %s: %s", checkpoint, told)
        if not first_decides(lambda checkpoint=checkpoint: is_unfinished(checkpoint)):  # type: ignore[misc]
            skipped.append(f"{checkpoint.name}: {told}")
    if skipped:
        raise ValueError(
            f"no checkpoint in {run} is complete ({'; '.join(skipped)}): name one in resume_from_checkpoint, or remove "
            "them to start afresh"
        )
    return None


def check_complete(checkpoint: Path) -> None:
    """Fail unless a checkpoint that was named is complete; all processes must call this.

    One without a list of files, as other Trainers write them, is taken, which is logged.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not complete.
    """
    if not first_decides(checkpoint.is_dir):
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {checkpoint}")
    if first_decides(lambda: not (checkpoint / MANIFEST_FILE).is_file() and not is_unfinished(checkpoint)):
        if is_first():
            logger.warning("%s has no list of its files, and is taken as it is, unchecked", checkpoint)
        return
    if (told := fault(checkpoint)) is not None:
        raise ValueError(
            f"cannot go on from {checkpoint}: {told}; resume_from_checkpoint=true takes the newest complete checkpoint"
        )


def clean(run: Path) -> None:
    """Remove what is left of checkpoints whose removal was broken off."""
    for path in run.glob(f".{PREFIX_CHECKPOINT_DIR}-*.removed"):
        shutil.rmtree(path, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _reason(error: BaseException, run: Path) -> str:
    """Why a checkpoint could not be written; torch's writer of archives does not say that the disk is full."""
    told = str(error)
    if isinstance(error, CheckpointException):
        told = "; ".join(f"process {number}: {raised}" for number, (raised, _) in error.failures.items())
    if "No space left" in told or shutil.disk_usage(run).free > _FULL:
        return told
    return f"No space left on device ({told})"
