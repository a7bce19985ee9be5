"""What lies beside a model that was trained or factorized here: how it was made and how good it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fnl.utils.folders import is_inside

METRICS_FILE = "metrics.json"
CONFIG_FILE = "run_config.json"
FACTORIZATION_FILE = "factorization.json"
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Record:
    """How a model was made; what is not known is empty.

    Args:
        metrics: Figures of the run by name, those of several phases under ``"phase-1 / eval_loss"``.
        settings: Options of the run.
        factorization: What ``hf-fnl factorize`` did: ``base_model``, ``command``, ``parameters_before``, ``layers``.
        steps: Optimizer steps of the run, all phases together.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    factorization: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Record:
        """Read what is there of the four files above.

        Args:
            folder: Folder of a model or a run. That of a run in phases has their states in ``phase-*`` folders.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If one of the files is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"record must be the folder of a run or of a model; there is none at {folder}")
        factorization = read_json(folder / FACTORIZATION_FILE)
        if reason := _damage(factorization):
            raise ValueError(f"{folder / FACTORIZATION_FILE} is damaged: {reason}")
        states = [read_json(part / STATE_FILE) for part in (folder, *sorted(folder.glob("phase-*")))]
        log = [entry for state in states for entry in state.get("log_history", [])]
        return cls(
            metrics=flatten(read_json(folder / METRICS_FILE)) or last_figures(log),
            settings=read_json(folder / CONFIG_FILE),
            factorization=factorization,
            steps=sum(state.get("global_step", 0) for state in states) or None,
        )

    @property
    def origins(self) -> list[str]:
        """Names or paths of the model that this one was made from."""
        # Where a model may also be a fresh one, `model` is the name of its sizes.
        source = self.settings.get("init_from" if "init_from" in self.settings else "model")
        named = (self.factorization.get("base_model"), source)
        return [name for name in named if name]


def _damage(factorization: Mapping[str, Any]) -> str | None:
    """Why a ``factorization.json`` cannot be one, if it cannot."""
    layers = factorization.get("layers", [])
    for layer in layers if isinstance(layers, list) else [layers]:
        if not (isinstance(layer, Mapping) and {"kind", "shape", "rank"} <= set(layer)):
            return "a layer lacks its kind, shape or rank"
        energy, shape = layer.get("energy"), layer["shape"]
        sizes = [layer["rank"], *(shape if isinstance(shape, list) else [None])]
        if not all(map(_is_count, sizes)) or not isinstance(layer["kind"], str):
            return f"a layer is of kind {layer['kind']!r}, shape {shape!r} and rank {layer['rank']!r}"
        if not (energy is None or isinstance(energy, int | float)):
            return f"the energy of a layer is {energy!r}"
    for key in ("parameters_before", "parameters_after"):
        if key in factorization and not _is_count(factorization[key]):
            return f"{key} is {factorization[key]!r}"
    for key in ("base_model", "command"):
        if not isinstance(factorization.get(key), str | None):
            return f"{key} is {factorization[key]!r}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def last_figures(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of each figure that a Trainer logged about evaluations and the whole of training."""
    return {key: entry[key] for entry in log for key in entry if key.startswith(("eval_", "train_"))}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no file.

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
    """The leaves of nested mappings, under names such as ``"phase-1 / eval_loss"``."""
    leaves: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        leaves |= flatten(value, f"{name} / ") if isinstance(value, Mapping) else {name: value}
    return leaves
