"""How processes that write one checkpoint meet: in the file system, so that they can while training goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_fnl.training.checkpoints.manifest import MANIFEST_FILE, file_record, write_manifest
from hf_fnl.utils.files import flush, write_json

_PATTERN = "receipt-*.json"
_PAUSE = 0.02


def give_receipt(folder: Path, number: int, files: Sequence[Path]) -> None:
    """Say that a process wrote its files, when they are on disk."""
    for path in files:
        flush(path)
    records = {path.relative_to(folder).as_posix(): file_record(path) for path in files}
    write_json(_receipt(folder, number), records)


def await_receipts(folder: Path, count: int, timeout: float, cancelled: threading.Event) -> None:
    """Wait until all processes have given their receipts.

    Raises:
        TimeoutError: If one has not in ``timeout`` seconds.
        RuntimeError: If ``cancelled`` was set meanwhile.
    """
    deadline = time.monotonic() + timeout
    while missing := [number for number in range(count) if not _receipt(folder, number).is_file()]:
        if cancelled.wait(_PAUSE):
            raise RuntimeError(f"process {missing[0]} did not write its part")
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"process {missing[0]} has not written its part into {folder} after {timeout:,.0f} s; output_dir must "
                "be a folder that all machines share, and ddp_timeout says how long to wait"
            )


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest of a checkpoint that all processes wrote; the receipts go."""
    files: dict[str, Any] = {}
    receipts = sorted(folder.glob(_PATTERN))
    for receipt in receipts:
        files |= json.loads(receipt.read_text(encoding="utf-8"))
    for receipt in receipts:
        receipt.unlink()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            flush(path)
        elif name != MANIFEST_FILE and name not in files:
            flush(path)
            files[name] = file_record(path)
    write_manifest(folder, files, **facts)


def _receipt(folder: Path, number: int) -> Path:
    return folder / _PATTERN.replace("*", f"{number:05}")
