"""The JSON files beside a model that was trained or factorized here: metrics, settings, what surgery did, the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_fnl.utils.folders import is_inside

METRICS_FILE = "metrics.json"
CONFIG_FILE = "run_config.json"
FACTORIZATION_FILE = "factorization.json"
STATE_FILE = "trainer_state.json"


def last_figures(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the newest value of each figure that a Trainer logged about evaluations and all of training."""
    return {key: entry[key] for entry in log for key in entry if key.startswith(("eval_", "train_"))}


def phase_folders(run: Path) -> list[Path]:
    """Return the folders ``phase-*`` of a run's trainings, by their numbers; none of a run that is one training."""
    folders = {folder: folder.name.removeprefix("phase-") for folder in run.glob("phase-*")}
    return sorted(folders, key=lambda folder: (int(folders[folder]) if folders[folder].isdigit() else 0, folder.name))


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no file.

    Raises:
        ValueError: If the file holds something else, or is a link that leaves its folder.
    """
    if not path.is_file():
        return {}
    if not is_inside(path, path.parent):
        raise ValueError(f"{path} is a link that leaves its folder, which is not followed: put the file itself there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: expected an object, found {type(content).__name__}")
    return content


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings, under names such as ``"phase-1 / eval_loss"``."""
    leaves: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        leaves |= flatten(value, f"{name} / ") if isinstance(value, Mapping) else {name: value}
    return leaves
