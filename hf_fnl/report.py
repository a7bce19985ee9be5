"""Pictures of a training run, from what the Trainer and the diagnostics wrote into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from hf_fnl.training.callbacks import DIAGNOSTICS_FILE

DIAGNOSTIC_PANELS = ("frobenius_norm", "nuclear_norm", "effective_rank", "effective_step_size")


def plot_loss(run: str | Path, target: str | Path) -> Path:
    """Draw training and evaluation loss against steps.

    Args:
        run: Output folder of a Trainer that saved its state.
        target: PNG file to write.

    Raises:
        FileNotFoundError: If the folder holds no ``trainer_state.json``.
    """
    history = json.loads(_existing(Path(run) / TRAINER_STATE_NAME).read_text())["log_history"]
    figure, axes = _canvas(1)
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        _plot(axes[0], points, label)
    axes[0].set(xlabel="step", ylabel="loss", title=Path(run).name)
    if axes[0].lines:
        axes[0].legend()
    return _save(figure, target)


def plot_diagnostics(run: str | Path, target: str | Path) -> Path:
    """Draw the diagnostics of every product against steps, one line a product.

    Args:
        run: Folder of a run with ``diagnostics_steps`` set.
        target: PNG file to write.

    Raises:
        FileNotFoundError: If the folder holds no ``diagnostics.jsonl``.
    """
    records = [json.loads(line) for line in _existing(Path(run) / DIAGNOSTICS_FILE).read_text().splitlines()]
    figure, axes = _canvas(len(DIAGNOSTIC_PANELS))
    for axis, name in zip(axes, DIAGNOSTIC_PANELS, strict=True):
        for product in records[0]["products"]:
            points = [(r["step"], r["products"][product][name]) for r in records if name in r["products"][product]]
            _plot(axis, points, product)
        axis.set(xlabel="step", title=name.replace("_", " "))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return _save(figure, target)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; was the run logged and finished?")
    return path


def _canvas(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(panels, 2)
    rows = -(-panels // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows + (1 if panels > 1 else 0)), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _plot(axis: Any, points: list[tuple[int, float]], label: str) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 20 else None)


def _save(figure: Any, target: str | Path) -> Path:
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    return target
