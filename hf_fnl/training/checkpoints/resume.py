"""Which checkpoint a run goes on from: only a whole one."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from hf_fnl.training.checkpoints.contents import aliases
from hf_fnl.training.checkpoints.folders import checkpoints, clean
from hf_fnl.training.checkpoints.manifest import fault
from hf_fnl.utils.processes import first_decides, gather, is_first, process, together

logger = logging.getLogger(__name__)


def newest_whole(run: Path) -> Path | None:
    """The newest whole checkpoint in the folder of a run, the same on all processes, which must all call this.

    Leftovers of a run that was killed are cleared away. Newer checkpoints that are not whole are logged, and stay.

    Returns:
        The checkpoint, or ``None`` if there is none at all.

    Raises:
        ValueError: If there are checkpoints and none of them is whole.
    """

    def found() -> list[Path]:
        clean(run)
        return checkpoints(run)

    faults = []
    for checkpoint in reversed(first_decides(found)):
        if (told := fault_of(checkpoint)) is None:
            return checkpoint
        faults.append(f"{checkpoint.name}: {told}")
        if is_first():
            logger.warning("skipped %s", faults[-1])
    if faults:
        raise ValueError(
            f"no checkpoint in {run} is whole ({'; '.join(faults)}): name another one in resume_from_checkpoint, or "
            "remove them to start afresh"
        )
    return None


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; processes, which must all call this, share the work and agree."""
    return next((told for told in gather(together(lambda: fault(checkpoint, process()))) if told), None)


def check_whole(checkpoint: Path) -> None:
    """Raise a ``ValueError`` that names the file if a checkpoint is not whole; all processes must call this."""
    if (told := fault_of(checkpoint)) is not None:
        raise ValueError(
            f"the checkpoint {checkpoint} is not whole: {told}; resume_from_checkpoint=true takes the newest whole one"
        )


@contextlib.contextmanager
def tied_are_not_missing(model: nn.Module) -> Iterator[None]:
    """Hold back the Trainer's warning of missing keys where each is tied to a parameter that the checkpoint holds."""

    def is_told(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("There were missing keys in the checkpoint"):
            return True
        missing = set(re.findall(r"'([^']+)'", message))
        tied = {name: names for names in aliases(model).values() for name in names}
        return any(missing.issuperset(tied.get(name, [name])) for name in missing)

    trainer_logger = logging.getLogger("transformers.trainer")
    trainer_logger.addFilter(is_told)
    try:
        yield
    finally:
        trainer_logger.removeFilter(is_told)
