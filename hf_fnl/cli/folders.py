"""Folders that appear whole or not at all, and the files of a model that its own class does not write."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

from hf_fnl.utils.files import check_writable
from hf_fnl.utils.folders import is_inside

# Tokenizers and processors, the parts of a sentence-transformers model, and what the law wants to stay beside it.
CARRIED = (
    *("*tokenizer*", "*vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.spm"),
    *("bpe.codes", "normalizer.json", "dict.txt", "emoji.json", "byte_maps.json", "tekken.json"),
    *("chat_template*", "additional_chat_templates/*", "*processor_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("LICENSE*", "NOTICE*"),
)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, which takes its place at the end; if anything fails, nothing is left of it.

    Raises:
        FileExistsError: If ``target`` holds files.
        NotADirectoryError: If it, or what it would lie in, is a file.
        PermissionError: If it cannot be written to.
    """
    target = target.expanduser().resolve()
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"--out {target} holds files already: name another folder, or remove it")
    check_writable("--out", target)
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def local_files(source: str, patterns: Sequence[str]) -> Path:
    """The folder itself, or one that holds the files of a model on the Hub whose names match."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    return Path(snapshot_download(source, allow_patterns=list(patterns)))


def carry_files(source: str, target: Path, *more: str) -> None:
    """Copy what makes a model usable beside its weights: tokenizer, processor, parts of sentence-transformers.

    Of links that leave the folder a warning tells; what they lead to is not copied.

    Args:
        source: Folder or Hub id of the model.
        target: Folder to copy to; files that are there already stay.
        more: Names of further files.
    """
    folder = local_files(source, (*CARRIED, *more))
    found = {path for pattern in (*CARRIED, *more) for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        if not (target / path.relative_to(folder)).exists() and _is_followed(path, folder):
            _copy(path, folder, target)
    for part in _parts(folder / "modules.json") if _is_followed(folder / "modules.json", folder) else ():
        home = local_files(source, [f"{part}/*"])
        for path in sorted((home / part).rglob("*")):
            if path.is_file() and _is_followed(path, home):
                _copy(path, home, target)


def _copy(path: Path, home: Path, target: Path) -> None:
    """Copy a file of a folder to the same place in another."""
    copy = target / path.relative_to(home)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, copy)


def _is_followed(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder; a warning tells of one that only a link brings there."""
    inside = is_inside(path, folder)
    if not inside:
        warnings.warn(f"{path} is a link that leaves the folder: what it leads to is not copied", stacklevel=2)
    return inside


def _parts(modules: Path) -> list[str]:
    """Folders of what sentence-transformers puts behind a model."""
    if not modules.is_file():
        return []
    try:
        paths = [PurePosixPath(module["path"]) for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{modules} is damaged: {error!r}") from error
    if outside := [str(path) for path in paths if path.is_absolute() or ".." in path.parts]:
        raise ValueError(f"{modules} names a folder outside of its own: {', '.join(outside)}")
    return [str(path) for path in paths if path.parts]
