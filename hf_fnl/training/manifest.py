"""The list of the files of a checkpoint, with sizes and checksums, by which it is known to be complete."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_fnl.utils.files import flush, write_json
from hf_fnl.utils.processes import first_decides, gather, process, raise_on_all

MANIFEST_FILE = "manifest.json"

_FORMAT = 2
_KEYS_OF_0_1 = {"files", "processes"}
_CHUNK = 1 << 24


class UnfinishedError(ValueError):
    """The saving of a checkpoint was broken off, so that it never was complete."""


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
        if mark_of(checkpoint).exists() or (checkpoint.is_dir() and not any(_files(checkpoint))):
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


def is_unfinished(checkpoint: Path) -> bool:
    """Return whether the saving of a checkpoint was broken off."""
    try:
        read_manifest(checkpoint)
    except UnfinishedError:
        return True
    except (OSError, ValueError):
        pass
    return False


def fault(checkpoint: Path) -> str | None:
    """Return why a checkpoint is not complete, naming the file, and ``None`` if it is.

    All processes must call this; they share the work and agree.
    """
    return next((told for told in gather(raise_on_all(lambda: next(_faults(checkpoint), None))) if told), None)


def mark_of(checkpoint: Path) -> Path:
    """Return the file that says that a checkpoint is being written: beside it, and not in what goes to the Hub."""
    return checkpoint.with_name(f"_{checkpoint.name}.unfinished")


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
    mark_of(checkpoint).unlink(missing_ok=True)


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
