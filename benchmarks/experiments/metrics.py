"""What a table may report of a run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_fnl.training.callbacks import DIAGNOSTICS_FILE


def _percentage(key: str) -> Callable[[Path, dict[str, Any]], float]:
    return lambda run, metrics: 100 * metrics[key]


def _effective_rank(run: Path, metrics: dict[str, Any]) -> float:
    """Mean over the products of ``||W||_* / ||W||_op``, at the last step at which they were watched."""
    last = json.loads((run / DIAGNOSTICS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    return statistics.fmean(figures["effective_rank"] for figures in last["products"].values())


METRICS: dict[str, Callable[[Path, dict[str, Any]], float]] = {
    "accuracy": _percentage("eval_accuracy"),
    "top5": _percentage("eval_top5_accuracy"),
    "effective_rank": _effective_rank,
    "perplexity": lambda run, metrics: metrics["eval_perplexity_per_token"],
    "word_perplexity": lambda run, metrics: metrics["eval_perplexity_per_word"],
    "bleu": lambda run, metrics: metrics["test"]["tokenized_bleu"],
    "hours": lambda run, metrics: metrics["seconds"] / 3600,
}


def measure(names: Sequence[str], run: Path, metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics of a run by name, accuracies in percent.

    Args:
        names: Any of ``METRICS``.
        run: Folder of the run.
        metrics: What its ``metrics.json`` holds.

    Raises:
        ValueError: If the run did not measure one of them.
    """
    found = {}
    for name in names:
        try:
            found[name] = METRICS[name](run, metrics)
        except (KeyError, FileNotFoundError) as error:
            raise ValueError(f"{run}: {name} was not measured, for {error} is missing") from error
    return found
