"""The checks that the Hub makes on the head of a model card, as far as its documentation and refusals tell them."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

LICENSES = {
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "afl-3.0", "artistic-2.0"),
    *("bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0"),
    *("cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "wtfpl"),
    *("ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1"),
    *("lgpl-3.0", "isc", "ms-pl", "mpl-2.0", "odc-by", "odbl", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense"),
    *("zlib", "pddl", "gemma", "llama2", "llama3", "unknown", "other"),
}
TASKS = {
    *("fill-mask", "question-answering", "text-classification", "token-classification", "multiple-choice"),
    *("text-generation", "feature-extraction", "sentence-similarity", "translation", "image-classification"),
}
SPECIAL_LANGUAGES = {"code", "multilingual"}
_HEAD = re.compile(r"^---\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)


def card_problems(content: str) -> list[str]:
    """What the Hub would refuse in a card; nothing if it is in order."""
    if (head := _HEAD.match(content)) is None:
        return []  # the Hub warns, and takes it
    try:
        data = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        return [f"the YAML cannot be read: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be an object"]
    problems = [f'"{key}" must not be empty' for key, value in data.items() if value is None]
    for key, check in _CHECKS.items():
        if data.get(key) is not None:
            problems += [f'"{key}" {problem}' for problem in check(data[key])]
    return problems


def _texts(value: Any) -> list[str]:
    good = isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)
    return [] if good else ["must be an array of strings"]


def _text(value: Any) -> list[str]:
    return [] if isinstance(value, str) and value else ["must be a string"]


def _one_of(allowed: set[str], value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"must be one of the known ones, got {entry}" for entry in values if entry not in allowed]


def _languages(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    wrong = [v for v in values if v not in SPECIAL_LANGUAGES and not re.fullmatch("[a-z]{2,3}", str(v))]
    return [f"must be an ISO 639 code, got {entry}" for entry in wrong]


def _ids(value: Any) -> list[str]:
    problems = []
    for name in value if isinstance(value, list) else [value]:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            problems.append(f"must hold ids of repositories: {error}")
    return problems


def _model_index(value: Any) -> list[str]:
    problems = []
    try:
        for entry in value:
            problems += [f"name: {problem}" for problem in _text(entry["name"])]
            for result in entry["results"]:
                texts = [result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]
                texts += [metric["type"] for metric in result["metrics"]]
                problems += [problem for text in texts for problem in _text(text)]
                numbers = [metric["value"] for metric in result["metrics"]]
                problems += ["needs a value of every metric" for number in numbers if not _is_value(number)]
    except (KeyError, TypeError) as error:
        problems.append(f"lacks {error}")
    return problems


def _is_value(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))


_CHECKS = {
    "license": lambda value: _one_of(LICENSES, value),
    "pipeline_tag": lambda value: _one_of(TASKS, value),
    "language": _languages,
    "library_name": _text,
    "tags": _texts,
    "metrics": _texts,
    "base_model": _ids,
    "datasets": _ids,
    "model-index": _model_index,
}
