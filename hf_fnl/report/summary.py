"""What a report found, in a sentence."""

from __future__ import annotations

import math

from hf_fnl.report.sources import LOSSES, Points, Source

# What else a Trainer and our tasks log of an evaluation: the loss, which has its own plot, speed and counts.
NOT_METRICS = {
    LOSSES["evaluation"],
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "eval_model_preparation_time",
    "eval_tokens",
    "eval_words",
}
_NAMED = 3  # metrics in a sentence


def summarize(source: Source) -> str:
    """A sentence on a run, a model or both: its size, how far it was trained, and how good it is."""
    return "; ".join(part for part in (_size(source), _training(source), _metrics(source)) if part) + "."


def _size(source: Source) -> str:
    total, dense = (source.figures.get(f"parameters / {name}") for name in ("total", "dense_equivalent"))
    if not source.model or total is None:
        return source.model
    left = f", {total / dense:.1%} of the dense model's {dense:,.0f}" if dense and dense != total else ""
    return f"{source.model} with {total:,.0f} parameters{left}, in {len(source.spectra)} matrices"


def _training(source: Source) -> str:
    parts = [_change(f"{kind} loss", points) for kind, points in source.losses.items()]
    steps = max([step for points in source.traces.values() for step, _ in points[-1:]], default=0)
    steps = max([steps, *(step for step, _ in source.history[-1:])])
    return ", ".join([f"trained for {steps:,} steps", *filter(None, parts)]) if steps or parts else ""


def _change(name: str, points: Points) -> str:
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if len(finite) < len(points):
        return f"{name} not finite from step {next(step for step, value in points if not math.isfinite(value)):,} on"
    first, last = finite[0][1], finite[-1][1]
    return f"{name} {last:.4g}" if len(finite) == 1 else f"{name} from {first:.4g} to {last:.4g}"


def _metrics(source: Source) -> str:
    last = {key: points[-1][1] for key, points in source.traces.items() if key.startswith("eval_")}
    figures = {key.rpartition(" / ")[2]: value for key, value in source.figures.items() if " / " not in key}
    found = {**figures, **last}
    named = [key for key in found if key not in NOT_METRICS and not key.startswith(("train_", "last ", "total_"))]
    named = [key for key in named if not key.endswith(("_per_second", "_runtime", "_flos")) and key != "epoch"]
    return ", ".join(f"{key.removeprefix('eval_').replace('_', ' ')} {found[key]:.4g}" for key in named[:_NAMED])
