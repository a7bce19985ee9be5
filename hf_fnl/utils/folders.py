"""Folders of models that others made: what is read of them lies inside of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hf_fnl.utils.hub import check_source

CONFIG = "config.json"
INDEX = "*.index*.json"
_READ = (CONFIG, "generation_config.json", "*.safetensors", INDEX)


def check_model(source: str | os.PathLike[str], subfolder: str = "", token: str | bool | None = None) -> None:
    """Check, before any work, that a model can be read from a folder or the Hub.

    Args:
        source: Folder or Hub id.
        subfolder: Of a folder that holds the model deeper down.
        token: For the Hub.

    Raises:
        FileNotFoundError: If there is neither, or the folder holds no ``config.json``.
        NotADirectoryError: If ``source`` is a file.
        ValueError: If a file of the folder is a link that leaves it, or the index of its weights names one outside.
    """
    root = Path(source).expanduser()
    if not root.exists():
        check_source(source, token=token)
        return
    if not root.is_dir():
        raise NotADirectoryError(f"{source} is a file; a model is a folder with a {CONFIG}")
    folder = root / subfolder
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}, which a model's folder needs")
    for path in (path for pattern in _READ for path in sorted(folder.glob(pattern))):
        if not is_inside(path, root):
            raise ValueError(
                f"{path} is a link that leaves its folder, which is not followed: put the file itself there"
            )
    for index in folder.glob(INDEX):
        _check_index(index)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, links followed, lies in a folder.

    A snapshot in the Hub's cache consists of links to the ``blobs`` beside it, which count as inside.
    """
    root = folder.resolve()
    snapshots = [parent for parent in (root, *root.parents) if parent.parent.name == "snapshots"]
    homes = [root, *(snapshot.parent.parent / "blobs" for snapshot in snapshots)]
    return any(path.resolve().is_relative_to(home) for home in homes)


def _check_index(index: Path) -> None:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    if strange := [name for name in names if not _is_file_name(name)]:
        raise ValueError(f"{index} names weights outside of its folder: {strange[0]}")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and name not in ("", ".", "..") and not {"/", "\\"} & set(name)
