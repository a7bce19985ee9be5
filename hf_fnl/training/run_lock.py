"""A lock on the folder of a run, so that two runs do not write into one folder."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from hf_fnl.utils.processes import first_decides, is_first

# The Hub's upload of an output_dir leaves names out that begin like this.
LOCK_FILE = "_lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases that of a process which dies.

    All processes of a run must call this. The lock is that of the first; within one process it may be taken again.

    Raises:
        RuntimeError: If another process holds it.
    """
    lock = _lock(folder)

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(lock)
        (folder / LOCK_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

    first_decides(take)
    try:
        yield
    finally:
        if is_first():
            lock.release()


def check_unlocked(folder: Path) -> None:
    """Raise a ``RuntimeError`` if a run of another process writes into a folder."""
    if (folder / LOCK_FILE).exists():
        lock = _lock(folder)
        _acquire(lock)
        lock.release()


def _lock(folder: Path) -> BaseFileLock:
    return FileLock(folder.absolute() / LOCK_FILE, timeout=0, is_singleton=True)


def _acquire(lock: BaseFileLock) -> None:
    path = Path(lock.lock_file)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(encoding="utf-8") or "another process"
        raise RuntimeError(f"output_dir {path.parent} is in use by {holder}: choose another output_dir") from None
