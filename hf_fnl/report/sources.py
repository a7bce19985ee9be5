"""The sources of a report: the folder of a run, that of a model, or a model of the Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

import hf_fnl.vision.models  # noqa: F401  (registers them)
from hf_fnl.models.surgery_loading import load
from hf_fnl.optim.diagnostics import Figures, forward_flops, parameter_count
from hf_fnl.report.inspection import Matrix, inspect_model, read_energies
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE
from hf_fnl.utils.run_files import CONFIG_FILE, METRICS_FILE, STATE_FILE, flatten, phase_folders, read_json
from hf_fnl.vision.interpolation import INTERPOLATION_FILE

History = list[tuple[int, dict[str, Figures]]]
Points = list[tuple[float, float]]

LOSSES = {"training": "loss", "evaluation": "eval_loss"}

# Where a run writes, what wrote it, and ranks layer by layer, which the tables of matrices have.
_NOT_SETTINGS = {
    *("output_dir", "logging_dir", "run_name"),
    *("transformers_version", "_name_or_path", "quantization_config"),
}


@dataclass(frozen=True)
class Source:
    """One run, one model, or both, as a report shows it; what a folder does not hold is empty.

    Args:
        name: The folder or Hub id, as it was given.
        traces: What the Trainer logged, by step, under its own names: ``"loss"``, ``"eval_accuracy"``,
            ``"conv/nuclear_norm"``.
        history: What :func:`~hf_fnl.optim.diagnostics.diagnose` said of every product, by step.
        figures: Sizes, losses and metrics.
        model: Class of the model.
        settings: Options of the model and of the run.
        matrices: Those of the model.
        energies: Energy that products kept at factorization.
        interpolation: Figures on the line from a dense baseline to this model, by ``t``.
    """

    name: str
    traces: dict[str, Points] = field(default_factory=dict)
    history: History = field(default_factory=list)
    figures: Figures = field(default_factory=dict)
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    matrices: list[Matrix] = field(default_factory=list)
    energies: dict[str, float] = field(default_factory=dict)
    interpolation: dict[str, Points] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, Points]:
        """Losses by step, under ``"training"`` and ``"evaluation"``."""
        return {kind: self.traces[key] for kind, key in LOSSES.items() if key in self.traces}


def read_sources(sources: Sequence[str | Path]) -> list[Source]:
    """Read all that a report is to show.

    Args:
        sources: Folders of runs (what a script wrote, one phase of it, or a checkpoint) or of models, or ids of models
            on the Hub.

    Raises:
        FileNotFoundError: If a folder holds neither a run nor a model, or a name is no folder and no model of the Hub.
        ValueError: If there is no source, one is given twice, or a file is damaged.
    """
    if not sources:
        raise ValueError("a report needs a run or a model")
    places = [Path(source).expanduser().resolve() for source in sources]
    if twice := sorted({str(source) for source, place in zip(sources, places, strict=True) if places.count(place) > 1}):
        raise ValueError(f"given more than once: {', '.join(twice)}")
    return [_read(source) for source in sources]


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a Trainer logged, as ``traces``, and diagnostics, as ``history``; phases one after the other.

    Args:
        folder: Output folder of a Trainer, or of a script with ``phase-*`` folders. Its ``trainer_state.json`` is
            read, or that of the newest checkpoint, as of a run that goes on, if that has come farther.

    Raises:
        ValueError: If a file is damaged.
    """
    traces: dict[str, Points] = {}
    history: History = []
    start = 0
    for part in phase_folders(folder) or [folder]:
        log = [(start + step, entry) for step, entry in _log(part)]
        for step, entry in log:
            for key, value in entry.items():
                if key not in ("step", "epoch") and isinstance(value, int | float):
                    traces.setdefault(key, []).append((step, value))
        history += [(start + step, products) for step, products in _history(part / DIAGNOSTICS_FILE)]
        start = max([start, *(step for step, _ in (*log[-1:], *history[-1:]))])
    return {"traces": traces, "history": history}


def _read(source: str | Path) -> Source:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return Source(str(source), **_model(load(str(source), use_safetensors=True)))
    run = read_run(folder)
    candidates = (folder, Path(get_last_checkpoint(folder) or folder))
    home = next((c for c in candidates if (c / CONFIG_NAME).is_file() and any(c.glob("*.safetensors"))), None)
    if not (home or any(run.values())):
        raise FileNotFoundError(
            f"{folder} holds neither a run ({STATE_FILE} or {DIAGNOSTICS_FILE}, in it or in its phase-* and "
            f"checkpoint-* folders) nor a model ({CONFIG_NAME} and *.safetensors)"
        )
    found: dict[str, Any] = {"figures": {}, "settings": {}}
    if home:
        found = {**_model(load(home, use_safetensors=True)), "energies": read_energies(home)}
    last = {f"last {kind} loss": run["traces"][key][-1][1] for kind, key in LOSSES.items() if key in run["traces"]}
    figures = last | flatten(read_json(folder / METRICS_FILE))
    found["figures"] |= {key: value for key, value in figures.items() if isinstance(value, int | float)}
    found["settings"] |= _settings(read_json(folder / CONFIG_FILE))
    return Source(str(source), **run, interpolation=_interpolation(folder / INTERPOLATION_FILE), **found)


def _model(model: PreTrainedModel) -> dict[str, Any]:
    figures: dict[str, Any] = {"parameters": parameter_count(model)}
    if model.main_input_name == "input_ids":
        figures["FLOPs per token"] = forward_flops(model)
    return {
        "figures": flatten(figures),
        "model": type(model).__name__,
        "settings": _settings(model.config.to_dict()),
        "matrices": inspect_model(model),
    }


def _log(part: Path) -> list[tuple[int, dict[str, Any]]]:
    """What a Trainer logged, by step, up to the last one that it wrote down."""
    states = {
        path: read_json(path) for path in (part / STATE_FILE, Path(get_last_checkpoint(part) or part, STATE_FILE))
    }
    path, state = max(states.items(), key=lambda item: item[1].get("global_step", 0) if item[1] else -1)
    try:
        return [(int(entry["step"]), entry) for entry in state.get("log_history", [])]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: an entry of its log lacks its step") from error


def _history(path: Path) -> History:
    if not path.is_file():
        return []
    # A line without an end is still being written.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    try:
        records = [json.loads(line) for line in lines]
        return [(record["step"], record["products"]) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _interpolation(path: Path) -> dict[str, Points]:
    """Figures by ``t``, under their names."""
    figures: dict[str, Points] = {}
    try:
        for point in read_json(path).get("points", []):
            for name in [name for name in point if name != "t"]:
                figures.setdefault(name, []).append((point["t"], point[name]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: a point lacks its t") from error
    return figures


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in options.items() if key not in _NOT_SETTINGS})
