"""One checkpoint at a time, written now or while training goes on."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hf_fnl.training.checkpoints.folders import publish, unfinished_folder
from hf_fnl.training.checkpoints.receipts import await_receipts, give_receipt, seal
from hf_fnl.utils.processes import first_decides, gather, is_first, process, together

_PAUSE = 0.02
# How long a training that broke off waits for the other processes' parts of its last checkpoint.
_PATIENCE = 5.0
# Bytes that may be left on a disk that is full.
_FULL = 1 << 16
# File systems that machines share may show what one has written to the others this many seconds later.
_VISIBLE_WITHIN = 120.0

Write = Callable[[], Sequence[Path]]


class Saving:
    """Writes the checkpoints of a run. All processes call its methods, at the same steps, but for :meth:`abandon`.

    Args:
        timeout: Seconds that the first process waits for what the others write in the background.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._checkpoint: Path | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._cancelled = threading.Event()

    @contextmanager
    def of(self, checkpoint: Path) -> Iterator[Path]:
        """The empty folder into which a checkpoint is to be written, when the one before is; it goes if that fails.

        Raises:
            RuntimeError: If the checkpoint, or the one before, could not be written.
        """
        self.finish()
        self._checkpoint, self._error = checkpoint, None
        folder = unfinished_folder(checkpoint)

        def make() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

        with self._reporting():
            first_decides(make)
            yield folder

    def run(self, write: Write, done: Callable[[], None], *, background: bool) -> None:
        """Write what is left of a checkpoint and give it its name.

        Args:
            write: Writes the part of this process, without talking to others, and returns its files.
            done: Called on the first process when the checkpoint has its name.
            background: Whether training goes on meanwhile.
        """
        self._cancelled.clear()
        if background:
            self._thread = threading.Thread(target=self._run_in_background, args=(write, done), daemon=True)
            self._thread.start()
            return
        together(lambda: self._write(write))
        first_decides(lambda: self._seal(done, min(self._timeout, _VISIBLE_WITHIN)))

    def poll(self) -> None:
        """Raise what went wrong in the background, on all processes at once.

        Raises:
            RuntimeError: If a process could not write its part.
        """
        if self._thread is None:
            return
        running = self._thread.is_alive()
        states = gather((running, self._error and f"{type(self._error).__name__}: {self._error}"))
        faults = [f"process {number}: {text}" for number, (_, text) in enumerate(states) if text]
        if faults:
            self._cancelled.set()
            self._thread.join()
            self._thread = None
            with self._reporting():
                raise RuntimeError("; ".join(faults)) from self._error
        if not any(running for running, _ in states):
            self._thread = None

    def finish(self) -> None:
        """Wait for what is written in the background.

        Raises:
            RuntimeError: As :meth:`poll`.
        """
        while self._thread is not None:
            self.poll()
            time.sleep(_PAUSE)

    def abandon(self) -> None:
        """Let what is written in the background come to its end, or give it up, without the other processes."""
        if self._thread is not None:
            self._thread.join(_PATIENCE)
            self._cancelled.set()
            self._thread.join()
            self._thread = None

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Say which checkpoint could not be written; all processes come here if one does."""
        try:
            yield
        except Exception as error:
            assert self._checkpoint is not None
            reason = _reason(error, self._checkpoint.parent)
            if is_first():
                shutil.rmtree(unfinished_folder(self._checkpoint), ignore_errors=True)
            raise RuntimeError(
                f"could not write {self._checkpoint}: {reason}; earlier checkpoints are as they were"
            ) from error

    def _run_in_background(self, write: Write, done: Callable[[], None]) -> None:
        try:
            self._write(write)
            if is_first():
                self._seal(done, self._timeout)
        except Exception as error:
            self._error = error

    def _write(self, write: Write) -> None:
        assert self._checkpoint is not None
        give_receipt(unfinished_folder(self._checkpoint), process()[0], write())

    def _seal(self, done: Callable[[], None], timeout: float) -> None:
        assert self._checkpoint is not None
        folder, count = unfinished_folder(self._checkpoint), process()[1]
        await_receipts(folder, count, timeout, self._cancelled)
        seal(folder, processes=count)
        publish(self._checkpoint)
        done()


def _reason(error: Exception, run: Path) -> str:
    """Why a checkpoint could not be written; torch's writer of archives does not say that the disk is full."""
    if "No space left" in str(error) or not run.is_dir() or shutil.disk_usage(run).free > _FULL:
        return str(error)
    return f"No space left on device ({error})"
