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
from huggingface_hub.constants import HF_HUB_CACHE

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
def new_folder(target: Path, *, source: str, overwrite: bool = False, needed: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder beside ``target``, which takes its place at the end; if anything fails, nothing is left of it.

    Args:
        target: The folder to be.
        source: What it is made from: a folder, or an id on the Hub.
        overwrite: Replace a folder that holds files.
        needed: Further files and folders that are read, as texts to calibrate with.

    Raises:
        FileExistsError: If ``target`` is a file, holds files and is not to be overwritten, or holds something of what
            is read, of the folder that the command runs in, or of the user's home.
    """
    target = target.expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"--out {target} is a file, and has to be a folder")
    if target.is_dir():
        _check_spared(target, [source, *needed])
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} holds files already; --overwrite replaces it")
    check_writable("--out", target)
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


def _check_spared(target: Path, read: Sequence[str]) -> None:
    """Raise unless a folder can be replaced without the loss of anything that is read from, or lived in."""
    for name in read:
        given = Path(name).expanduser()
        lost = given if given.exists() else Path(HF_HUB_CACHE)
        if _holds(target, lost):
            raise FileExistsError(f"--out {target} must be another folder than {name}, and not one that contains it")
        if lost.is_dir() and _holds(lost, target) and any(target.iterdir()):
            raise FileExistsError(f"--out {target} holds files of {name}: name another folder")
        inner = [path for path in (lost.rglob("*") if given.is_dir() else ()) if path.is_symlink()]
        if linked := next((path for path in inner if _holds(target, path)), None):
            raise FileExistsError(f"--out {target} holds what {linked} is a link to: name another folder")
    if _holds(target, Path.home()) or (target != Path.cwd() and _holds(target, Path.cwd())):
        raise FileExistsError(f"--out {target} holds your home or the folder that you are in: name another folder")


def _holds(folder: Path, path: Path) -> bool:
    """Whether a folder is that of a path, links followed, or one above it, in whatever case its name is written."""
    real = path.resolve()
    return any(place.exists() and place.samefile(folder) for place in (real, *real.parents))


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
