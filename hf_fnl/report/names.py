"""What runs and models are called in a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Settings that make runs what they are, in the order in which a name has them.
_TELLING = (
    "model",
    "decay",
    "factor_init",
    "rank_scale",
    "ratio",
    "conv_scheme",
    "overcomplete",
    "pruning",
    "dense_epochs",
    "optim",
    "learning_rate",
    "weight_decay",
    "seed",
)
_LONGEST = 48  # characters that fit into a legend


def labels(settings: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Call runs by the settings in which they differ, as in ``decay=frobenius, rank_scale=0.25``.

    Args:
        settings: Options of each run.
        names: What they are called where that is too long, does not tell them apart, or one has no such settings.
    """
    shared = [key for key in _TELLING if all(key in each for each in settings)]
    differing = [key for key in shared if len({json.dumps(each[key]) for each in settings}) > 1]
    found = [", ".join(_setting(key, each[key]) for key in differing) for each in settings]
    tell_apart = len(set(found)) == len(found) and 0 < max(map(len, found)) <= _LONGEST
    return found if tell_apart else list(names)


def path_ends(sources: Sequence[str | Path]) -> list[str]:
    """The ends of the paths that tell them apart: ``run`` for one, ``a/run`` and ``b/run`` for two.

    Raises:
        ValueError: If there is no path, or one is given twice.
    """
    if not sources:
        raise ValueError("a report needs a run or a model")
    paths = [Path(source).expanduser() for source in sources]
    parts = [path.resolve().parts if path.is_dir() else (str(path),) for path in paths]
    if twice := {str(path) for path, part in zip(paths, parts, strict=True) if parts.count(part) > 1}:
        raise ValueError(f"given more than once: {', '.join(sorted(twice))}")
    lengths = range(1, max(map(len, parts)) + 1)
    candidates = (["/".join(part[-length:]) for part in parts] for length in lengths)
    return next(names for names in candidates if len(set(names)) == len(names))


def _setting(key: str, value: Any) -> str:
    if value is None:
        return f"{key} unset"
    return f"{key}={'+'.join(map(str, value)) if isinstance(value, list) else value}"
