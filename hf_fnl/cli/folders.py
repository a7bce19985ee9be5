"""Folders that appear whole or not at all, and the files of a model that its own class does not write."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download

# Tokenizers and processors, the parts of a sentence-transformers model, and what the law wants to stay beside it.
CARRIED = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.spm"),
    *("chat_template*", "*processor_config.json"),
    *("modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("LICENSE*", "NOTICE*"),
)


@contextlib.contextmanager
def new_folder(target: Path, *, source: str, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside ``target``, which takes its place at the end; if anything fails, nothing is left of it.

    Args:
        target: The folder to be.
        source: What it is made from; that is not overwritten.
        overwrite: Replace a folder that holds files.

    Raises:
        FileExistsError: If ``target`` is a file or the source, or holds files and is not to be overwritten.
    """
    target = target.expanduser().resolve()
    if target == Path(source).expanduser().resolve():
        raise FileExistsError(f"--out must be another folder than the model itself, got {target}")
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file; --out names a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} holds files already; --overwrite replaces it")
    made = [parent for parent in target.parents if not parent.exists()]
    unfinished = _beside(target, "unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _replace(target, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _beside(target: Path, word: str) -> Path:
    return target.with_name(f".{target.name}.{word}-{os.getpid()}")


def _replace(target: Path, finished: Path) -> None:
    """Rename ``finished`` to ``target``; what stood there is removed last, and comes back if the renaming fails."""
    if not target.exists():
        finished.rename(target)
        return
    former = _beside(target, "former")
    target.rename(former)
    try:
        finished.rename(target)
    except OSError:
        former.rename(target)
        raise
    shutil.rmtree(former)


def local_files(source: str, patterns: Sequence[str]) -> Path:
    """The folder itself, or one that holds the files of a model on the Hub whose names match."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else Path(snapshot_download(source, allow_patterns=list(patterns)))


def carry_files(source: str, target: Path, *more: str) -> None:
    """Copy what makes a model usable beside its weights: tokenizer, processor, parts of sentence-transformers.

    Args:
        source: Folder or Hub id of the model.
        target: Folder to copy to; files that are there already stay.
        more: Names of further files.
    """
    folder = local_files(source, (*CARRIED, *more))
    for path in sorted({path for pattern in (*CARRIED, *more) for path in folder.glob(pattern) if path.is_file()}):
        if not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    for part in _parts(folder / "modules.json"):
        if (found := local_files(source, [f"{part}/*"]) / part).is_dir():
            shutil.copytree(found, target / part)


def _parts(modules: Path) -> list[str]:
    """Folders of what sentence-transformers puts behind a model."""
    if not modules.is_file():
        return []
    try:
        paths = [PurePosixPath(module["path"]) for module in json.loads(modules.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{modules} is damaged: {error!r}") from error
    if outside := [str(path) for path in paths if path.is_absolute() or ".." in path.parts]:
        raise ValueError(f"{modules} names a folder outside of its own: {', '.join(outside)}")
    return [str(path) for path in paths if path.parts]
