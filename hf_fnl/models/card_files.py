"""Files of model cards, beside the weights and on the Hub. One that a person wrote is never replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers.utils import CONFIG_NAME

from hf_fnl.models.cards import MARK, Record, model_card
from hf_fnl.utils.folders import is_inside
from hf_fnl.utils.run_files import read_json

CARD_FILE = "README.md"
# By these words a card is known for one that no person wrote: ours, or one of two that Transformers writes.
_AUTOMATIC = (MARK, "model card has been automatically generated", "model card has been generated automatically")
# What a person may have stated in an automatic card.
_KEPT = ("language", "license", "license_name", "license_link", "tags")


def write_card(path: str | os.PathLike[str], model: nn.Module, **known: Any) -> bool:
    """Write the card of a model, unless a person wrote the one that is there.

    Licence, language and tags of an automatic card are taken over.

    Args:
        path: The file, by custom ``README.md`` beside the weights.
        model: The model.
        known: Further arguments of :func:`model_card`.

    Returns:
        Whether it was written.
    """
    path = Path(path)
    if path.is_file():
        if not is_automatic(path):
            return False
        first, second = known.get("metadata") or ModelCardData(), stated_in(path)
        given = {key: value for key, value in vars(first).items() if value is not None}
        tags = [*(first.tags or ()), *(second.tags or ())]
        known["metadata"] = ModelCardData(**{**vars(second), **given, "tags": tags})
    model_card(model, **known).save(path)
    return True


class UploadsCard:
    """Mixin before a ``PreTrainedModel``: what is pushed to the Hub gets a card of ours, unless a person wrote one."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push as Transformers does, after the card, which Transformers then finds there and keeps."""
        _push_card(self, repo_id, options)
        return super().push_to_hub(repo_id, **options)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | os.PathLike, *, push_to_hub: bool = False, **options: Any) -> None:
        """Save as Transformers does; ``push_to_hub=True`` pushes the card first."""
        if push_to_hub:
            _push_card(self, options.get("repo_id", Path(save_directory).name), options)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **options)  # type: ignore[misc]


def _push_card(model: Any, repo_id: str, options: Mapping[str, Any]) -> None:
    """Put a card into a repository of the Hub, from the files of the folder that the model was loaded from.

    A card that a person wrote stays, on the Hub or, where the Hub has none, in that folder.
    """
    if options.get("create_pr") or options.get("revision"):
        return
    token, private = options.get("token"), options.get("private")
    repo_id = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id
    folder = Path(model.name_or_path or "")
    # A model that was converted keeps the path of the one that it was made from, whose files are not its own.
    is_home = read_json(folder / CONFIG_NAME).get("architectures") == [type(model).__name__]
    with tempfile.TemporaryDirectory() as temporary:
        path, local = Path(temporary, CARD_FILE), folder / CARD_FILE
        fetch_card(path, repo_id, token)
        is_on_hub = path.is_file()
        if not is_on_hub and is_home and local.is_file() and is_inside(local, folder):
            shutil.copyfile(local, path)
        known = {
            "record": Record.read(folder) if is_home else None,
            "metadata": ModelCardData(tags=options.get("tags")),
        }
        if write_card(path, model, name=repo_id, **known) or not is_on_hub:
            ModelCard.load(path).push_to_hub(repo_id, token=token)


def fetch_card(path: Path, repo_id: str, token: Any = None) -> None:
    """Copy the card of a repository of the Hub, if any, to ``path``, unless a person wrote the one that is there."""
    if path.is_file() and not is_automatic(path):
        return
    with contextlib.suppress(EntryNotFoundError):
        shutil.copyfile(hf_hub_download(repo_id, CARD_FILE, token=token), path)


def is_automatic(path: str | os.PathLike[str]) -> bool:
    """Whether no person has taken the card in this file into their hands."""
    content = Path(path).read_text(encoding="utf-8", errors="replace")
    return any(words in content for words in _AUTOMATIC)


def stated_in(path: Path, keys: Sequence[str] = _KEPT) -> ModelCardData:
    """Return what the head of a card says under some keys, as texts and lists of texts.

    Args:
        path: The card; a warning tells if its head cannot be read, and nothing is taken from it.
        keys: Fields of ``ModelCardData``.
    """
    try:
        if not is_inside(path, path.parent):
            raise ValueError("it is a link that leaves its folder")
        found = vars(ModelCard.load(path, ignore_metadata_errors=True).data)
    except Exception as error:  # of YAML, of the Hub's client, or of the file: a card is no reason to lose the model
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"what {path} says in its head is left out, for it cannot be read: {reason}", stacklevel=2)
        return ModelCardData()
    stated: dict[str, Any] = {key: _texts(found.get(key)) for key in keys}
    if isinstance(stated.get("tags"), str):
        stated["tags"] = [stated["tags"]]
    return ModelCardData(**stated)


def _texts(value: Any) -> str | list[str] | None:
    """A text on one line, or the texts of a list; nothing of anything else."""
    if isinstance(value, list):
        return [" ".join(text.split()) for text in value if isinstance(text, str)] or None
    return " ".join(value.split()) if isinstance(value, str) else None
