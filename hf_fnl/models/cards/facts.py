"""The body of a model card: sizes and ranks of a model, its data, results and settings, in words and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from hf_fnl.layers import factorized_layers
from hf_fnl.models.cards.record import FACTORIZATION_FILE, Record
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.surgery.config import TransformerRanks
from hf_fnl.utils.suggest import printable

TRAINED_ON = ("dataset", "train_dataset")
PACKAGE = "hf_fnl"
EMBEDDED = ("embedded", "digits")  # data sets that lie in packages
_EVALUATED_ON = ("eval_dataset", "validation_dataset")
_FILES = {".json", ".jsonl", ".parquet", ".txt", ".gz"}
_SETTINGS = (
    *("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "weight_decay"),
    *("momentum", "lr_milestones", "num_train_epochs"),
    *("decay", "frobenius_decay", "frobenius_coefficient", "factor_decay", "overcomplete", "pruning"),
    *("phases", "max_seq_length", "mlm_probability", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("bf16", "fp16", "seed"),
)


def describe(
    model: Any, record: Record, *, base_model: str | list[str] | None, data: str | list[str] | None
) -> dict[str, Any]:
    """What the template of a card shows.

    Args:
        model: The model.
        record: How it was made.
        base_model: What it was made from. Default: what the record says.
        data: What it was trained on. Default: what the record says.
    """
    dense_class = getattr(model, "dense_class", None)
    package = type(model).__module__.partition(".")[0]
    return {
        "class_name": type(model).__name__,
        "package": package,
        "dense_class": dense_class and dense_class.__name__,
        "needs_import": not dense_class and package != PACKAGE and bool(factorized_layers(model)),
        "facts": [*_sizes(model, record), *((fact, plain(v)) for fact, v in _origin(record, base_model, data))],
        "layers": list(_layers(model, record)),
        "results": [(code(key), _number(value)) for key, value in record.metrics.items() if _is_result(key, value)],
        "settings": [(code(key), plain(listed)) for key in _SETTINGS if (listed := _listed(record.settings.get(key)))],
    }


def plain(value: object) -> str:
    """Text that Markdown shows as it is: on one line, no table cell, link, markup or HTML in it."""
    return re.sub(r"([\\`*\[\]<>|&$~]|\b_|_\b)", r"\\\1", _one_line(value))


def _one_line(value: object) -> str:
    # JSON may hold half of a surrogate pair, which no file can.
    return printable(" ".join(str(value).encode("utf-8", "replace").decode().split()))


def code(value: object) -> str:
    """A span of code in a Markdown table: on one line, with more backticks around it than there are in it."""
    text = _one_line(value).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{text}{ticks}" if ticks == "`" else f"{ticks} {text} {ticks}"


def model_ranks(model: nn.Module) -> dict[str, Any]:
    """The ranks in the configuration of a model of ours; none of another."""
    ranks = getattr(getattr(model, "config", None), "ranks", None)
    if not isinstance(ranks, TransformerRanks):
        return {}
    values = {field.name: getattr(ranks, field.name) for field in fields(ranks) if field.name != "init"}
    return {option: rank for option, rank in values.items() if (any(rank) if isinstance(rank, list) else rank)}


def is_hub_id(name: Any) -> TypeGuard[str]:
    """Whether a name is written as an id on the Hub and is no file, folder or embedded data set here."""
    if not isinstance(name, str) or name in EMBEDDED or Path(name).exists() or Path(name).suffix in _FILES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _sizes(model: nn.Module, record: Record) -> Iterator[tuple[str, str]]:
    count = parameter_count(model)
    total = int(count["total"])
    before = record.factorization.get("parameters_before", int(count["dense_equivalent"]))
    after = record.factorization.get("parameters_after", total)
    yield "class", f"`{type(model).__name__}`"
    if ranks := model_ranks(model):
        yield "ranks", ", ".join(f"`{option}` {_spread(rank)}" for option, rank in ranks.items())
    yield "parameters", f"{total:,}"
    if after != total:
        yield "parameters when factorized", f"{after:,}"
    if before != after:
        yield "parameters of the dense model", f"{before:,}, of which {after / before:.1%} are left"
    if record.factorization.get("layers"):
        yield "rank of each layer", f"`{FACTORIZATION_FILE}`"


def _origin(
    record: Record, base_model: str | list[str] | None, data: str | list[str] | None
) -> Iterator[tuple[str, str]]:
    origin = _listed(base_model) or next(map(_public, record.origins), "")
    trained_on = _listed(data) or _sources(record, TRAINED_ON)
    for fact, value in (
        ("made from", origin),
        ("trained on", trained_on),
        ("evaluated on", _sources(record, _EVALUATED_ON)),
        ("optimizer steps", f"{record.steps:,}" if record.steps else ""),
    ):
        if value:
            yield fact, value


def _layers(model: nn.Module, record: Record) -> Iterator[dict[str, Any]]:
    """A row for the layers of each kind and shape."""
    listed = record.factorization.get("layers") or [
        {"kind": layer.kind, "shape": layer.shape, "rank": layer.rank} for layer in factorized_layers(model)
    ]
    groups: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for layer in listed:
        groups.setdefault((layer["kind"], tuple(layer["shape"])), []).append(layer)
    for (kind, shape), layers in groups.items():
        kept = [layer["energy"] for layer in layers if layer.get("energy") is not None]
        yield {
            "kind": plain(kind),
            "shape": " x ".join(map(str, shape)),
            "count": len(layers),
            "rank": _spread([layer["rank"] for layer in layers]),
            "energy": f"{sum(kept) / len(kept):.1%}" if kept else "",
        }


def _spread(ranks: int | list[int | None]) -> str:
    """One rank, or the least and the largest of several; a layer without one is dense."""
    values: list[int | None] = ranks if isinstance(ranks, list) else [ranks]
    numbers = sorted({rank for rank in values if rank is not None})
    spread = " to ".join(map(str, dict.fromkeys((*numbers[:1], *numbers[-1:]))))
    return f"{spread}, dense in {values.count(None)} of {len(values)} layers" if None in values else spread


def _is_result(metric: str, value: Any) -> bool:
    """Whether a figure of a run says how good the model is, or how long that took."""
    size_or_speed = metric.startswith("parameters / ") or metric.endswith(("_per_second", "_flos"))
    return isinstance(value, int | float) and not size_or_speed


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _sources(record: Record, options: Sequence[str]) -> str:
    return ", ".join(_public(source) for option in options if (source := record.settings.get(option)))


def _public(source: Any) -> str:
    """A name to publish, or several: of a path, which nobody else has, the last part only."""
    if isinstance(source, list | tuple):
        return ", ".join(map(_public, source))
    return source if is_hub_id(source) else Path(str(source)).name


def _listed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value in (None, False) else str(value)
