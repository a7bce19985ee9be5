"""Pictures of a training run, from what the Trainer and the diagnostics wrote into its folder."""

from __future__ import annotations

from pathlib import Path

from hf_fnl.report.drawing import draw_png
from hf_fnl.report.sections import IN_TRAINING, loss_section, make_section
from hf_fnl.report.sources import Source, read_run
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE
from hf_fnl.utils.run_files import STATE_FILE


def plot_loss(run: str | Path, target: str | Path) -> Path:
    """Draw training and evaluation loss against steps.

    Args:
        run: Output folder of a Trainer that saved its state.
        target: PNG file to write.

    Raises:
        FileNotFoundError: If the folder holds no ``trainer_state.json`` with losses.
    """
    source = Source(str(run), **read_run(run))
    if not source.losses:
        raise FileNotFoundError(f"{run} holds no {STATE_FILE} with losses; was the run logged and finished?")
    return draw_png(loss_section([source]).panels, target, columns=1)


def plot_diagnostics(run: str | Path, target: str | Path) -> Path:
    """Draw norms, effective rank and effective step size of the products against steps, a column for each role.

    Args:
        run: Folder of a run with ``diagnostics_steps`` set.
        target: PNG file to write.

    Raises:
        FileNotFoundError: If the folder holds no ``diagnostics.jsonl``.
    """
    source = Source(str(run), **read_run(run))
    if not source.history:
        raise FileNotFoundError(f"{run} holds no {DIAGNOSTICS_FILE}; was the run started with --diagnostics_steps?")
    rows = [make_section([source], quantity).panels for quantity in IN_TRAINING]
    return draw_png([panel for row in rows for panel in row], target, columns=len(rows[0]))
