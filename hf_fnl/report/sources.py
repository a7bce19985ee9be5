"""Reading what a report is about: the folder of a run, that of a model, or a model of the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from hf_fnl.diagnostics import Figures, forward_flops, parameter_count
from hf_fnl.models.cards.record import CONFIG_FILE, METRICS_FILE, STATE_FILE, flatten, read_json
from hf_fnl.models.checkpoint import load
from hf_fnl.report.inspection import Progress, Spectrum, measure_spectra, read_energies
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE

History = list[tuple[int, dict[str, Figures]]]
Points = list[tuple[int, float]]

LOSSES = {"training": "loss", "evaluation": "eval_loss"}

# Where a run writes, what wrote it, and ranks layer by layer, which the tables of matrices have.
_NOT_SETTINGS = {
    "output_dir",
    "logging_dir",
    "run_name",
    "transformers_version",
    "_name_or_path",
    "quantization_config",
}


@dataclass(frozen=True)
class Source:
    """One run, one model, or both, as a report shows it; what a folder does not hold is empty.

    Args:
        name: What it is called in the report.
        place: Where it lies.
        losses: Losses by step, under ``"training"`` and ``"evaluation"``.
        history: What :func:`~hf_fnl.diagnostics.diagnose` said of every product, by step.
        figures: Sizes, losses and metrics.
        settings: Options of the model and of the run.
        spectra: Singular values of the matrices of the model.
        energies: Energy that products kept at factorization.
    """

    name: str
    place: str
    losses: dict[str, Points] = field(default_factory=dict)
    history: History = field(default_factory=list)
    figures: Figures = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    spectra: list[Spectrum] = field(default_factory=list)
    energies: dict[str, float] = field(default_factory=dict)


def read_sources(sources: Sequence[str | Path], progress: Progress | None = None) -> list[Source]:
    """Read all that a report is to show.

    Args:
        sources: Folders of runs (what a script wrote, one phase of it, or a checkpoint) or of models, or ids of models
            on the Hub.
        progress: Called while the matrices of each model are decomposed, with how many are done and how many there are.

    Raises:
        FileNotFoundError: If a folder holds neither a run nor a model, or a name is no folder and no model of the Hub.
        ValueError: If there is no source, one is given twice, or a file is damaged.
    """
    names = _names(sources)
    return [_read(source, name, progress) for source, name in zip(sources, names, strict=True)]


def read_run(folder: str | Path) -> tuple[dict[str, Points], History]:
    """Losses and diagnostics of a run; those of several phases one after the other.

    Args:
        folder: Output folder of a Trainer, or of a script with ``phase-*`` folders. Without a ``trainer_state.json``
            that of the newest checkpoint is read.

    Raises:
        ValueError: If a file is damaged.
    """
    folder = Path(folder)
    losses: dict[str, Points] = {}
    history: History = []
    start = 0
    for part in sorted(folder.glob("phase-*"), key=_phase_number) or [folder]:
        for name, points in _losses(part).items():
            losses.setdefault(name, []).extend((start + step, loss) for step, loss in points)
        history += [(start + step, products) for step, products in _history(part / DIAGNOSTICS_FILE)]
        start = max([start, *(points[-1][0] for points in losses.values()), *(step for step, _ in history[-1:])])
    return losses, history


def _read(source: str | Path, name: str, progress: Progress | None) -> Source:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return Source(name, str(source), **_model(_load_from_hub(str(source)), progress))
    losses, history = read_run(folder)
    home = _model_folder(folder)
    if not (home or losses or history):
        raise FileNotFoundError(
            f"{folder} holds neither a run ({STATE_FILE} or {DIAGNOSTICS_FILE}, in it or in its phase-* and "
            f"checkpoint-* folders) nor a model ({CONFIG_NAME} and *.safetensors)"
        )
    model = _model(load(home, use_safetensors=True), progress) if home else {"figures": {}, "settings": {}}
    figures = {
        **{f"last {key} loss": points[-1][1] for key, points in losses.items()},
        **flatten(read_json(folder / METRICS_FILE)),
    }
    model["figures"] |= {key: value for key, value in figures.items() if isinstance(value, int | float)}
    model["settings"] |= _settings(read_json(folder / CONFIG_FILE))
    energies = read_energies(home) if home else {}
    return Source(name, str(folder), losses=losses, history=history, energies=energies, **model)


def _model(model: PreTrainedModel, progress: Progress | None) -> dict[str, Any]:
    sizes = {"parameters": parameter_count(model), "FLOPs per token": forward_flops(model)}
    return {
        "figures": flatten(sizes),
        "settings": _settings(model.config.to_dict()),
        "spectra": measure_spectra(model, progress),
    }


def _load_from_hub(name: str) -> PreTrainedModel:
    try:
        return load(name, use_safetensors=True)
    except OSError as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and no model that can be read from the Hub: {error}"
        ) from error


def _model_folder(folder: Path) -> Path | None:
    candidates = (folder, Path(get_last_checkpoint(folder) or folder))
    return next((c for c in candidates if (c / CONFIG_NAME).is_file() and any(c.glob("*.safetensors"))), None)


def _losses(part: Path) -> dict[str, Points]:
    candidates = (part, Path(get_last_checkpoint(part) or part))
    states = (read_json(c / STATE_FILE) for c in candidates)
    log: list[dict[str, Any]] = next((state["log_history"] for state in states if "log_history" in state), [])
    points = {name: [(entry["step"], entry[key]) for entry in log if key in entry] for name, key in LOSSES.items()}
    return {name: values for name, values in points.items() if values}


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


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in options.items() if key not in _NOT_SETTINGS})


def _phase_number(folder: Path) -> tuple[int, str]:
    number = folder.name.removeprefix("phase-")
    return (int(number) if number.isdigit() else 0), folder.name


def _names(sources: Sequence[str | Path]) -> list[str]:
    """The ends of the paths that tell them apart: ``run`` for one, ``a/run`` and ``b/run`` for two."""
    if not sources:
        raise ValueError("a report needs a run or a model")
    paths = [Path(source).expanduser() for source in sources]
    parts = [path.resolve().parts if path.is_dir() else (str(path),) for path in paths]
    if twice := {str(path) for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1}:
        raise ValueError(f"given more than once: {', '.join(sorted(twice))}")
    lengths = range(1, max(map(len, parts)) + 1)
    candidates = (["/".join(part[-length:]) for part in parts] for length in lengths)
    return next(names for names in candidates if len(set(names)) == len(names))
