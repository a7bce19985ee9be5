"""Which files a checkpoint consists of, and whether they are as they were written."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from hf_fnl.utils.files import flush, write_json

MANIFEST_FILE = "manifest.json"

_CHUNK = 1 << 24
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "global_step*", "pytorch_model_fsdp*")


def file_record(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    found = path.stat()
    return {"bytes": found.st_size, "crc32": _checksum(path, found.st_size, found.st_mtime_ns, found.st_ino)}


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    """Write what a checkpoint consists of, when all else in it is on disk.

    Args:
        folder: The checkpoint.
        files: A :func:`file_record` by path in the folder.
        **facts: What else is to be known of the checkpoint.
    """
    write_json(folder / MANIFEST_FILE, {**facts, "files": dict(sorted(files.items()))})
    flush(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; ``None`` if it has none, as those of Transformers.

    Raises:
        ValueError: If it cannot be read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["files"], dict):
            raise ValueError("its files are no table")
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST_FILE} is damaged: {error!r}") from error


def fault(folder: Path, part: tuple[int, int] = (0, 1)) -> str | None:
    """Why a checkpoint is not whole, naming the file; ``None`` if it is.

    Args:
        folder: The checkpoint.
        part: Check the checksums of every ``part[1]``-th file only, from number ``part[0]``: processes share the work.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    if manifest is None:
        return next(_faults_without_manifest(folder), None)
    return next(_faults(folder, manifest["files"], part), None)


def _faults(folder: Path, files: Mapping[str, Mapping[str, Any]], part: tuple[int, int]) -> Iterator[str]:
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif (size := path.stat().st_size) != record["bytes"]:
            yield f"{name} has {size:,} of {record['bytes']:,} bytes"
    for name, record in list(files.items())[part[0] :: part[1]]:
        if file_record(folder / name)["crc32"] != record["crc32"]:
            yield f"{name} is not as it was written: its checksum differs"


def _faults_without_manifest(folder: Path) -> Iterator[str]:
    """Faults of a checkpoint of Transformers, or of an older version: files that cannot be opened."""
    if not (folder / TRAINER_STATE_NAME).is_file():
        yield f"{TRAINER_STATE_NAME} is missing"
    if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        yield "it holds no weights"
    for path in sorted(folder.rglob("*")):
        opens = _OPENS.get(path.suffix)
        if path.is_file() and opens is not None:
            try:
                opens(path)
            except (ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:
                yield f"{path.relative_to(folder)} cannot be read: {error}"


def _open_safetensors(path: Path) -> None:
    with safe_open(path, framework="pt"):
        pass


def _open_pickle(path: Path) -> None:
    with zipfile.ZipFile(path):
        pass


_OPENS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": _open_safetensors,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    **dict.fromkeys((".pt", ".pth", ".bin"), _open_pickle),
}


@lru_cache(maxsize=4096)
def _checksum(path: Path, *identity: int) -> str:
    """Checksum of a file, kept while its size, time and place on disk are the same."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
