"""Model cards: written from what is known, and kept away from those that a person wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_fnl.models.cards.facts import describe, plain
from hf_fnl.models.cards.metadata import card_metadata
from hf_fnl.models.cards.record import Record, read_json
from hf_fnl.utils.folders import is_inside
from hf_fnl.utils.suggest import printable

CARD_FILE = "README.md"
MARK = "<!-- Written by hf_fnl. Remove this line to keep the card from being written anew. -->"

# By these words a card is known for one that no person wrote: ours, or one of two that Transformers writes.
_AUTOMATIC = (MARK, "model card has been automatically generated", "model card has been generated automatically")
_TEMPLATE = Path(__file__).with_name("template.md")
_KEPT = (
    "language",
    "license",
    "license_name",
    "license_link",
    "tags",
)  # what a person may have stated in an automatic card


def model_card(
    model: nn.Module,
    *,
    name: str | None = None,
    record: Record | str | os.PathLike[str] | None = None,
    data: str | None = None,
    command: str | None = None,
    metadata: ModelCardData | None = None,
) -> ModelCard:
    """Describe a model for the Hub: ranks, parameters before and after, data, metrics, settings, command, licence.

    What is not known is left out; a licence is never guessed. Results stand in the Hub's ``model-index`` where they
    were measured on a whole split of a data set of the Hub.

    Args:
        model: The model: of ours, factorized in place, or merged.
        name: Id on the Hub, or path, under which it will be loaded.
        record: How it was made, or the folder of the run or model that says so.
        data: What it was trained on, in words. Default: the data sets in the record.
        command: The command that made it. Default: the one in the record.
        metadata: What only you know, such as ``license``, ``language`` or ``base_model``. It comes before what is read
            off; tags are added to ours.

    Raises:
        FileNotFoundError: If ``record`` is no folder.
        ValueError: If a file of the record is damaged.
    """
    if record is not None and not isinstance(record, Record):
        record = Record.read(record)
    record = record or Record()
    title = (name or type(model).__name__).rstrip("/").rpartition("/")[2]
    card_data = card_metadata(model, record, title=title, name=name, stated=metadata or ModelCardData())
    command = command or record.factorization.get("command")
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        mark=MARK,
        title=plain(title),
        name=printable(json.dumps(name or "path/to/model", ensure_ascii=False)),
        command=None if command is None else printable(command),
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", command or "")), default=0)),
        licence=plain(_joined(card_data.license)),
        **describe(model, record, base_model=card_data.base_model, data=data or card_data.datasets),
    )


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
        known["metadata"] = _united(known.get("metadata") or ModelCardData(), stated_in(path))
    model_card(model, **known).save(path)
    return True


def write_upload_card(folder: str | os.PathLike[str], model: PreTrainedModel, repo_id: str) -> None:
    """Write the card into a folder that is about to be uploaded, where Transformers has put its own or the Hub's.

    What a person wrote on the Hub stays. Next comes what a person wrote in the folder that the model was loaded from,
    and then a card of ours from the record in either folder. A folder counts if it holds a model of this class, for a
    model that was converted keeps the path of the one it was made from.

    Raises:
        ValueError: If a file of the record is damaged.
    """
    path, metadata = Path(folder, CARD_FILE), ModelCardData()
    homes = [home for home in map(Path, (folder, model.name_or_path or folder)) if _holds(home, model)]
    records = [record for home in homes if (record := Record.read(home)) != Record()]
    origin = homes[-1] / CARD_FILE if homes else path
    if is_automatic(path) and origin.is_file() and origin != path:
        if not is_automatic(origin):
            shutil.copyfile(origin, path)
            return
        metadata = stated_in(origin)
    write_card(path, model, name=repo_id, record=records[0] if records else None, metadata=metadata)


def is_automatic(path: str | os.PathLike[str]) -> bool:
    """Whether no person has taken the card in this file into their hands."""
    content = Path(path).read_text(encoding="utf-8", errors="replace")
    return any(words in content for words in _AUTOMATIC)


def stated_in(path: Path, keys: Sequence[str] = _KEPT) -> ModelCardData:
    """What the head of a card says under some keys, as texts and lists of texts.

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


def _joined(value: str | list[str] | None) -> str:
    return ", ".join(value) if isinstance(value, list) else value or ""


def _united(first: ModelCardData, second: ModelCardData) -> ModelCardData:
    """The fields of the first, and those of the second that it lacks; the tags of both."""
    given = {key: value for key, value in vars(first).items() if value is not None}
    tags = [*(first.tags or ()), *(second.tags or ())]
    return ModelCardData(**{**vars(second), **given, "tags": tags})


def _holds(folder: Path, model: nn.Module) -> bool:
    return read_json(folder / CONFIG_NAME).get("architectures") == [type(model).__name__]
