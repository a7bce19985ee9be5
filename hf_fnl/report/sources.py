"""Reading what a report is about: the folder of a run, that of a model, or a model of the Hub."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME

from hf_fnl.models.checkpoint import load
from hf_fnl.optim.diagnostics import Figures, parameter_count
from hf_fnl.report.inspection import Progress, Spectrum, measure_spectra, read_energies
from hf_fnl.report.names import labels, path_ends
from hf_fnl.report.operations import operations
from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE
from hf_fnl.utils.run_files import CONFIG_FILE, METRICS_FILE, STATE_FILE, flatten, read_json
from hf_fnl.vision.interpolation import INTERPOLATION_FILE

History = list[tuple[int, dict[str, Figures]]]
Points = list[tuple[float, float]]

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
# What Transformers writes down otherwise than it is given.
_DERIVED = ("accelerator_config", "dataloader_pin_memory", "hub_token", "report_to", "debug", "disable_tqdm")
_NOT_TRACES = {"step", "epoch"}


@dataclass(frozen=True)
class Source:
    """One run, one model, or both, as a report shows it; what a folder does not hold is empty.

    Args:
        name: What it is called in the report.
        place: Where it lies.
        traces: What the Trainer logged, by step, under its own names: ``"loss"``, ``"eval_accuracy"``,
            ``"conv/nuclear_norm"``.
        history: What :func:`~hf_fnl.optim.diagnostics.diagnose` said of every product, by step.
        figures: Sizes, losses and metrics.
        model: Class of the model.
        settings: Options of the model and of the run.
        defaults: Names of those that are as they are where nobody chooses.
        spectra: Singular values of the matrices of the model.
        energies: Energy that products kept at factorization.
        interpolation: Figures on the line from a dense baseline to this model, by ``t``.
    """

    name: str
    place: str
    traces: dict[str, Points] = field(default_factory=dict)
    history: History = field(default_factory=list)
    figures: Figures = field(default_factory=dict)
    model: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    defaults: frozenset[str] = frozenset()
    spectra: list[Spectrum] = field(default_factory=list)
    energies: dict[str, float] = field(default_factory=dict)
    interpolation: dict[str, Points] = field(default_factory=dict)

    @property
    def losses(self) -> dict[str, Points]:
        """Losses by step, under ``"training"`` and ``"evaluation"``."""
        return {kind: self.traces[key] for kind, key in LOSSES.items() if key in self.traces}


def read_sources(sources: Sequence[str | Path], progress: Progress | None = None) -> list[Source]:
    """Read all that a report is to show.

    Runs are called by the settings in which they differ where that is short, everything else by the end of its path.

    Args:
        sources: Folders of runs (what a script wrote, one phase of it, or a checkpoint) or of models, or ids of models
            on the Hub.
        progress: Called while the matrices of each model are decomposed, with how many are done and how many there are.

    Raises:
        FileNotFoundError: If a folder holds neither a run nor a model, or a name is no folder and no model of the Hub.
        ValueError: If there is no source, one is given twice, or a file is damaged.
    """
    names = path_ends(sources)
    read = [_read(source, name, progress) for source, name in zip(sources, names, strict=True)]
    called = labels([source.settings for source in read], names)
    return [replace(source, name=label) for source, label in zip(read, called, strict=True)]


def read_run(folder: str | Path) -> tuple[dict[str, Points], History]:
    """What a Trainer logged, and the diagnostics of a run; those of several phases one after the other.

    Args:
        folder: Output folder of a Trainer, or of a script with ``phase-*`` folders. Without a ``trainer_state.json``
            that of the newest checkpoint is read.

    Raises:
        ValueError: If a file is damaged.
    """
    folder = Path(folder)
    traces: dict[str, Points] = {}
    history: History = []
    start = 0
    for part in sorted(folder.glob("phase-*"), key=_phase_number) or [folder]:
        log = [(start + entry["step"], entry) for entry in _log(part)]
        for step, entry in log:
            for key, value in entry.items():
                if key not in _NOT_TRACES and isinstance(value, int | float):
                    traces.setdefault(key, []).append((step, value))
        history += [(start + step, products) for step, products in _history(part / DIAGNOSTICS_FILE)]
        start = max([start, *(step for step, _ in (*log[-1:], *history[-1:]))])
    return traces, history


def _read(source: str | Path, name: str, progress: Progress | None) -> Source:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return Source(name, str(source), **_model(load(str(source), use_safetensors=True), progress))
    traces, history = read_run(folder)
    home = _model_folder(folder)
    if not (home or traces or history):
        raise FileNotFoundError(
            f"{folder} holds neither a run ({STATE_FILE} or {DIAGNOSTICS_FILE}, in it or in its phase-* and "
            f"checkpoint-* folders) nor a model ({CONFIG_NAME} and *.safetensors)"
        )
    model = (
        _model(load(home, use_safetensors=True), progress)
        if home
        else {"figures": {}, "settings": {}, "defaults": frozenset()}
    )
    figures = {f"last {kind} loss": traces[key][-1][1] for kind, key in LOSSES.items() if key in traces}
    figures |= flatten(read_json(folder / METRICS_FILE))
    model["figures"] |= {key: value for key, value in figures.items() if isinstance(value, int | float)}
    of_run = _settings(read_json(folder / CONFIG_FILE))
    model["settings"] |= of_run
    model["defaults"] |= _defaults(of_run, _of_arguments())
    model["energies"] = read_energies(home) if home else {}
    line = _interpolation(folder / INTERPOLATION_FILE)
    return Source(name, str(folder), traces=traces, history=history, interpolation=line, **model)


def _model(model: PreTrainedModel, progress: Progress | None) -> dict[str, Any]:
    settings = _settings(model.config.to_dict())
    return {
        "figures": flatten({"parameters": parameter_count(model), **operations(model)}),
        "model": type(model).__name__,
        "settings": settings,
        "defaults": _defaults(settings, _of_class(model.config)),
        "spectra": measure_spectra(model, progress),
    }


def _defaults(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> frozenset[str]:
    """Names of settings that have their default; where none is known, of those that are empty."""

    def is_default(name: str, value: Any) -> bool:
        if value is None or name.startswith(_DERIVED):
            return True
        return bool(value == defaults[name]) if name in defaults else not value

    return frozenset(name for name, value in settings.items() if is_default(name, value))


def _of_class(config: PreTrainedConfig) -> dict[str, Any]:
    """The defaults of a configuration; of one that cannot be made without options there are none."""
    try:
        return _settings(type(config)().to_dict())
    except Exception:  # whatever the configuration of somebody else wants
        return {}


def _of_arguments() -> dict[str, Any]:
    """The defaults of the training arguments, as a run writes them down."""
    found = {}
    for option in dataclasses.fields(FLAMBeTrainingArguments):
        value = option.default if option.default_factory is dataclasses.MISSING else option.default_factory()
        found[option.name] = value.value if isinstance(value, enum.Enum) else value
    return found


def _model_folder(folder: Path) -> Path | None:
    candidates = (folder, Path(get_last_checkpoint(folder) or folder))
    return next((c for c in candidates if (c / CONFIG_NAME).is_file() and any(c.glob("*.safetensors"))), None)


def _log(part: Path) -> list[dict[str, Any]]:
    candidates = (part, Path(get_last_checkpoint(part) or part))
    states = (read_json(c / STATE_FILE) for c in candidates)
    return next((state["log_history"] for state in states if "log_history" in state), [])


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


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({key: value for key, value in options.items() if key not in _NOT_SETTINGS})


def _phase_number(folder: Path) -> tuple[int, str]:
    number = folder.name.removeprefix("phase-")
    return (int(number) if number.isdigit() else 0), folder.name
