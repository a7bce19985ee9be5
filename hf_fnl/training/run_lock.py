"""A lock on the folder of a run, so that two runs do not write into one folder."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from hf_fnl.utils.files import write_json
from hf_fnl.utils.processes import first_decides, is_first

# The Hub's upload of an output_dir leaves names out that begin like this.
LOCK_FILE = "_lock.json"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; a lock that a dead process of this host left behind is taken over.

    All processes of a run must call this. The lock is that of the first; within one process it may be taken again.

    Raises:
        RuntimeError: If another process holds it, or a run on another host left it.
    """
    mine = first_decides(lambda: _acquire(folder))
    try:
        yield
    finally:
        if mine and is_first():
            with contextlib.suppress(FileNotFoundError):
                (folder / LOCK_FILE).unlink()


def check_unlocked(folder: Path) -> None:
    """Fail if a run that may be alive writes into a folder.

    Raises:
        RuntimeError: As :func:`locked`.
    """
    path = folder / LOCK_FILE
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        host, number, started = str(holder["host"]), int(holder["process"]), holder["started"]
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(
            f"output_dir {folder} is locked by an unreadable {path}: remove it if no run goes on"
        ) from None
    if host != socket.gethostname():
        raise RuntimeError(
            f"output_dir {folder} is in use by process {number} on {host}: choose another output_dir; if that run is "
            f"dead, remove {path}"
        )
    if number != os.getpid() and started == _started(number):
        raise RuntimeError(f"output_dir {folder} is in use by process {number} on {host}: choose another output_dir")


def _acquire(folder: Path) -> bool:
    """Whether the lock was taken; else this process has it already."""
    folder.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder):
        check_unlocked(folder)
        mine = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid())}
        path = folder / LOCK_FILE
        if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == mine:
            return False
        write_json(path, mine)
    return True


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of a host look at the lock and take it; where files cannot be locked so, nothing is done."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _started(number: int) -> str | None:
    """When a process of this host started, in ticks that no clock moves; ``None`` if it is dead.

    Where the system does not say, all living processes have one answer.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if status[0] in "ZX" else status[19]
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"
