"""Checkpoints of Transformers' Trainer that are known to be complete: each gets a list of its files, written last."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fnl.training.engines import innermost
from hf_fnl.utils.files import flush, write_json
from hf_fnl.utils.processes import first_decides, gather, is_first, process, raise_on_all

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"

_FORMAT = 2
_KEYS_OF_0_1 = {"files", "processes"}
_CHUNK = 1 << 24
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class UnfinishedError(ValueError):
    """The saving of a checkpoint was broken off, so that it never was complete."""


class CompleteCheckpoints(TrainerCallback):
    """Writes the list of the files of a checkpoint when all processes have written theirs, and removes older ones.

    Any Trainer may have this callback. In a Trainer of Transformers leave ``limit`` to ``save_total_limit``; that one
    removes older checkpoints before the new one is known to be complete, and goes by the clock.

    Args:
        limit: Checkpoints that stay, beside the best one; ``None`` for all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.unfinished: Path | None = None
        self.written: set[Path] = set()

    def begin(self, checkpoint: Path) -> None:
        """Note that a checkpoint is about to be written; what is left of one of that name goes. For all processes."""

        def make() -> None:
            if checkpoint.exists():
                remove(checkpoint)
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            _mark(checkpoint).touch()
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


def is_unfinished(checkpoint: Path) -> bool:
    """Return whether the saving of a checkpoint was broken off."""
    try:
        read_manifest(checkpoint)
    except UnfinishedError:
        return True
    except (OSError, ValueError):
        pass
    return False


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; at no moment does a part of it have its name."""
    removed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    _mark(checkpoint).unlink(missing_ok=True)
    shutil.rmtree(removed, ignore_errors=True)


def write_manifest(checkpoint: Path, **facts: Any) -> None:
    """Write the list of the files of a checkpoint, with sizes and checksums, when all are on disk.

    All processes must call this, when they have written theirs; they share the work.

    Args:
        checkpoint: The folder.
        **facts: What else is to be known of it.
    """
    gather(None)  # until all have written
    names = first_decides(lambda: sorted(_files(checkpoint)))
    number, count = process()
    records = raise_on_all(lambda: {name: _flushed(checkpoint / name) for name in names[number::count]})
    files = {name: record for part in gather(records) for name, record in part.items()}
    first_decides(lambda: _write(checkpoint, {**facts, "files": dict(sorted(files.items()))}))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the list of the files of a checkpoint, and the facts beside it.

    Raises:
        FileNotFoundError: If it has none.
        UnfinishedError: If its saving was broken off.
        ValueError: If the list is damaged, or of version 0.1.
    """
    path = checkpoint / MANIFEST_FILE
    if not path.is_file():
        if _mark(checkpoint).exists() or (checkpoint.is_dir() and not any(_files(checkpoint))):
            raise UnfinishedError("its saving was broken off")
        raise FileNotFoundError(
            f"it has no {MANIFEST_FILE}, the list of its files: another Trainer wrote it, or the list was removed"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.keys() == _KEYS_OF_0_1:
            raise NotImplementedError
        if content.pop("checksum") != _checksum_of(content) or content["format"] != _FORMAT:
            raise ValueError
    except NotImplementedError:
        raise ValueError(
            "hf_fnl 0.1 wrote it, and a training of 0.1 is not resumed by this version: begin a new one from its "
            "weights, which from_pretrained reads, or go on with hf_fnl 0.1"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"its {MANIFEST_FILE}, the list of its files, is damaged") from None
    return content


def fault(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not complete, naming the file, and ``None`` if it is.

    All processes must call this; they share the work and agree.
    """
    return next((told for told in gather(raise_on_all(lambda: next(_faults(checkpoint), None))) if told), None)


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


def _mark(checkpoint: Path) -> Path:
    """Return the file that says that a checkpoint is being written: beside it, and not in what goes to the Hub."""
    return checkpoint.with_name(f"_{checkpoint.name}.unfinished")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _files(checkpoint: Path) -> Iterator[str]:
    """Paths of the files in a checkpoint, but for its list and what became of writing that."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name not in (MANIFEST_FILE, f"{MANIFEST_FILE}.unfinished"):
            yield path.relative_to(checkpoint).as_posix()


def _faults(checkpoint: Path) -> Iterator[str]:
    """Faults of a checkpoint; each process compares the content of its share of the files."""
    try:
        files: Mapping[str, Mapping[str, Any]] = read_manifest(checkpoint)["files"]
    except (OSError, ValueError) as error:
        yield str(error)
        return
    for name, record in files.items():
        path = checkpoint / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != record["bytes"]:
            yield f"{name} has {size:,} of {record['bytes']:,} bytes"
    number, count = process()
    for name, record in list(files.items())[number::count]:
        if _checksum(checkpoint / name) != record["crc32"]:
            yield f"{name} is not as it was written: its checksum differs"


def _write(checkpoint: Path, content: dict[str, Any]) -> None:
    content = {"format": _FORMAT, **content}
    write_json(checkpoint / MANIFEST_FILE, {"checksum": _checksum_of(content), **content})
    for folder in (checkpoint, checkpoint.parent):
        flush(folder)
    _mark(checkpoint).unlink(missing_ok=True)


def _flushed(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, which is on disk then, its name included."""
    flush(path)
    flush(path.parent)
    return {"bytes": path.stat().st_size, "crc32": _checksum(path)}


def _checksum(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def _checksum_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
