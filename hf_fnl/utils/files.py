"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def flush(path: str | os.PathLike[str]) -> None:
    """Wait until the content of a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write beside ``path``, flush, then rename: a failure leaves what was there before; folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_bytes(content)
        flush(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file as :func:`write_bytes` does."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write a JSON file as :func:`write_text` does."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_writable(option: str, folder: Path) -> None:
    """Check that a folder can be made, or written to if it is there.

    Args:
        option: That names it.
        folder: The folder.

    Raises:
        PermissionError: If it cannot be written to.
        NotADirectoryError: If it, or what it would lie in, is a file.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {folder}: there is no permission to write to {there}")
