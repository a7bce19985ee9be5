"""Model cards, written from what is known: the model itself, and the record of the run or factorization behind it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import initialization as init
from transformers.modelcard import TASK_MAPPING
from transformers.utils import CONFIG_NAME

from hf_fnl.config import TransformerRanks
from hf_fnl.diagnostics import parameter_count
from hf_fnl.layers import Factorized
from hf_fnl.models.record import FACTORIZATION_FILE, Record, read_json

CARD_FILE = "README.md"
MARK = "<!-- Written by hf_fnl. Remove this line to keep the card from being written anew. -->"

# By these words a card is known for one that no person wrote: ours, or one of two that Transformers writes.
_AUTOMATIC = (MARK, "model card has been automatically generated", "model card has been generated automatically")
_TEMPLATE = Path(__file__).with_name("card_template.md")
_KEPT = ("language", "license", "license_name", "license_link")  # what a person may have stated in an automatic card
_FILES = (".json", ".jsonl", ".parquet", ".txt", ".gz", ".bz2", ".xz", ".zst")
_TRAINED_ON = ("dataset", "train_dataset")
_EVALUATED_ON = ("eval_dataset", "validation_dataset")
_SETTINGS = (
    ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay")
    + ("frobenius_decay", "frobenius_coefficient", "frobenius_mode")
    + ("phases", "max_seq_length", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm")
    + ("num_train_epochs", "mlm_probability", "bf16", "fp16", "seed")
)


@dataclass(frozen=True)
class _Evaluation:
    """Where the settings of a run say what its metrics were measured on."""

    task: str
    data: Sequence[str]
    split: str
    limit: str
    metrics: Mapping[str, tuple[str, str]]  # identifier on the Hub and name in words


_EVALUATIONS = (
    _Evaluation(
        task="question-answering",
        data=("eval_dataset", "train_dataset"),
        split="eval_split",
        limit="max_eval_questions",
        metrics={"exact_match": ("exact_match", "Exact match"), "f1": ("f1", "F1")},
    ),
    _Evaluation(
        task="fill-mask",
        data=("validation_dataset",),
        split="validation_split",
        limit="max_validation_documents",
        metrics={"eval_mlm_accuracy": ("accuracy", "Accuracy at masked tokens")},
    ),
)


def model_card(
    model: nn.Module,
    *,
    name: str | None = None,
    record: Record | str | os.PathLike[str] | None = None,
    data: str | None = None,
    command: str | None = None,
    metadata: ModelCardData | None = None,
) -> ModelCard:
    """Describe a model for the Hub: ranks, parameters before and after, data, metrics, settings, command, licence.

    What is not known is left out; a licence is never guessed. Results stand in the Hub's ``model-index`` where they were
    measured on the whole split of a data set of the Hub.

    Args:
        model: The model, of ours, factorized in place, or merged.
        name: Id on the Hub, or path, under which it will be loaded.
        record: How it was made, or the folder of the run or model that says so.
        data: What it was trained on, in words. Default: the data sets in the record.
        command: The command that made it. Default: the one in the record.
        metadata: What only you know, such as ``license``, ``language`` or ``base_model``. It comes before what is read
            off; tags are added to ours.

    Raises:
        FileNotFoundError: If ``record`` is no folder.
        ValueError: If a file of the record is damaged.
    """
    if record is not None and not isinstance(record, Record):
        if not Path(record).is_dir():
            raise FileNotFoundError(f"record must be the folder of a run or a model, there is none at {record}")
        record = Record.read(record)
    record = record or Record()
    title = (name or type(model).__name__).rstrip("/").rpartition("/")[2]
    base_model = _base_model(model, record, name)
    card_data = _metadata(model, title, base_model, record, metadata or ModelCardData())
    base_model = card_data.base_model or _public(base_model)
    dense_class = getattr(model, "dense_class", None)
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        mark=MARK,
        title=title,
        name=name or "path/to/model",
        package=type(model).__module__.partition(".")[0],
        class_name=type(model).__name__,
        dense_class=dense_class and dense_class.__name__,
        facts=list(_facts(model, record, base_model, data or _listed(card_data.datasets))),
        layers=list(_layers(model, record)),
        results=[(key, _number(value)) for key, value in record.metrics.items() if _is_result(key, value)],
        settings=[(key, _listed(value)) for key in _SETTINGS if (value := record.settings.get(key)) not in (None, False)],
        command=command or record.factorization.get("command"),
    )


def write_card(path: str | os.PathLike[str], model: nn.Module, **known: Any) -> bool:
    """Write the card of a model, unless a person wrote the one that is there.

    Licence, language and tags of an automatic card are taken over.

    Args:
        path: The file, by custom ``README.md`` beside the weights.
        model: The model.
        known: Further arguments of :func:`model_card`.

    Returns:
        Whether it was written.
    """
    path = Path(path)
    if path.is_file():
        if not is_automatic(path.read_text(encoding="utf-8")):
            return False
        found = vars(ModelCard.load(path, ignore_metadata_errors=True).data)
        stated = vars(known.get("metadata") or ModelCardData())
        kept = {key: found[key] for key in _KEPT if found.get(key) and not stated.get(key)}
        tags = [*(stated["tags"] or ()), *(found["tags"] or ())]
        known["metadata"] = ModelCardData(**{**stated, **kept, "tags": tags})
    model_card(model, **known).save(path)
    return True


def is_automatic(card: str) -> bool:
    """Whether no person has taken this card into their hands."""
    return any(words in card for words in _AUTOMATIC)


def find_record(model: nn.Module, *folders: str | os.PathLike[str] | None) -> Record:
    """The record in the first folder that holds a model of this class and a record; an empty one if there is none.

    The class is asked because a model that was converted keeps the path of the one it was made from.
    """
    for folder in map(Path, filter(None, folders)):
        if read_json(folder / CONFIG_NAME).get("architectures") == [type(model).__name__]:
            record = Record.read(folder)
            if record != Record():
                return record
    return Record()


def is_hub_id(name: object) -> bool:
    """Whether a name can be an id on the Hub: it is written as one, and is no file, folder or embedded data set here."""
    if not isinstance(name, str) or name in ("", "embedded") or name.endswith(_FILES) or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _metadata(
    model: nn.Module, title: str, base_model: str | None, record: Record, stated: ModelCardData
) -> ModelCardData:
    given = {key: value for key, value in vars(stated).items() if value is not None}
    task = given.get("pipeline_tag") or _task(model)
    results = list(_results(record, task))
    datasets = [name for key in _TRAINED_ON if is_hub_id(name := record.settings.get(key))]
    derived = {
        "base_model": base_model if is_hub_id(base_model) else None,
        "datasets": datasets or None,
        "library_name": "transformers",
        "metrics": [result.metric_type for result in results] or None,
        "pipeline_tag": task,
    }
    if on_hub := [result for result in results if is_hub_id(result.dataset_type)]:
        derived |= {"model_name": title, "eval_results": on_hub}
    tags = ["hf_fnl"]
    tags += ["low-rank"] if record.factorization or _ranks(model) or any(_factorized(model)) else []
    tags += ["flambe"] if record.settings.get("optim") == "flambe" else []
    return ModelCardData(**{**derived, **given, "tags": tags + (given.get("tags") or [])})


def _results(record: Record, task: str | None) -> Iterator[EvalResult]:
    """The metrics with a name on the Hub; ``dataset_type`` is empty if only a part of the data was measured."""
    last = {key.rpartition(" / ")[2]: value for key, value in record.metrics.items()}  # the last phase counts
    for evaluation in _EVALUATIONS:
        data = next((name for key in evaluation.data if (name := record.settings.get(key))), "")
        whole = record.settings.get(evaluation.limit) is None
        for key, (metric, words) in evaluation.metrics.items():
            if task in (None, evaluation.task) and math.isfinite(last.get(key, math.nan)):
                yield EvalResult(
                    task_type=evaluation.task,
                    dataset_type=data if whole else "",
                    dataset_name=data.rpartition("/")[2],
                    dataset_split=record.settings.get(evaluation.split),
                    metric_type=metric,
                    metric_name=words,
                    metric_value=last[key],
                )


def _task(model: nn.Module) -> str | None:
    """The Hub's task for the head of a model, if there is exactly one."""
    name = getattr(model, "dense_class", type(model)).__name__
    tasks = [
        task
        for task, heads in TASK_MAPPING.items()
        if any(name in (head if isinstance(head, tuple | list) else (head,)) for head in heads.values())
    ]
    return tasks[0] if len(tasks) == 1 else None


def _base_model(model: nn.Module, record: Record, name: str | None) -> str | None:
    origins = [record.factorization.get("base_model"), record.settings.get("model"), record.settings.get("init_from")]
    loaded = getattr(model, "name_or_path", "")
    return next((origin for origin in origins if origin), loaded if is_hub_id(loaded) and loaded != name else None)


def _facts(model: nn.Module, record: Record, base_model: Any, data: str) -> Iterator[tuple[str, str]]:
    total = int(parameter_count(model)["total"])
    before = record.factorization.get("parameters_before") or dense_size(model)
    after = record.factorization.get("parameters_after", total)
    yield "class", f"`{type(model).__name__}`"
    if ranks := _ranks(model):
        yield "ranks", ", ".join(f"`{option}` {_spread(rank)}" for option, rank in ranks.items())
    yield "parameters", f"{total:,}"
    if before != total:
        yield "parameters of the dense model", f"{before:,}: {total / before:.1%} are left"
    if after != total:
        yield "parameters of the factorized model", f"{after:,}"
    if base_model:
        yield "made from", _listed(base_model)
    trained_on = [_public(name) for key in _TRAINED_ON if (name := record.settings.get(key))]
    if described := data or ", ".join(filter(None, trained_on)):
        yield "trained on", described
    if evaluated_on := [_public(name) for key in _EVALUATED_ON if (name := record.settings.get(key))]:
        yield "evaluated on", ", ".join(filter(None, evaluated_on))
    if record.steps:
        yield "optimizer steps", f"{record.steps:,}"
    if record.factorization.get("layers"):
        yield "each layer's rank", f"`{FACTORIZATION_FILE}`"


def dense_size(model: nn.Module) -> int:
    """Parameters of the stock model in whose place a factorized one stands, heads at their full width."""
    if not _ranks(model):
        return int(parameter_count(model)["dense_equivalent"])
    with torch.device("meta"), init.no_init_weights():
        dense = model.dense_class(model.config.to_dense())
    dense.tie_weights()
    return int(parameter_count(dense)["total"])


def _ranks(model: nn.Module) -> dict[str, Any]:
    """The ranks in the configuration of a model of ours; none of another."""
    ranks = getattr(getattr(model, "config", None), "ranks", None)
    if not isinstance(ranks, TransformerRanks):
        return {}
    options = (field.name for field in fields(ranks) if field.name != "init")
    return {option: rank for option in options if (rank := getattr(ranks, option)) is not None}


def _factorized(model: nn.Module) -> Iterator[Factorized]:
    """Factorized layers, those that share their factors once."""
    modules = (module for module in model.modules() if isinstance(module, Factorized))
    yield from {id(next(iter(module.factors()))): module for module in modules}.values()


def _layers(model: nn.Module, record: Record) -> Iterator[dict[str, Any]]:
    """Rows for the layers of each kind and shape."""
    listed = record.factorization.get("layers") or [
        {"kind": layer.kind, "shape": layer.shape, "rank": layer.rank} for layer in _factorized(model)
    ]
    groups: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for layer in listed:
        groups.setdefault((layer["kind"], tuple(layer["shape"])), []).append(layer)
    for (kind, shape), layers in groups.items():
        kept = [layer["energy"] for layer in layers if layer.get("energy") is not None]
        yield {
            "kind": kind,
            "shape": " x ".join(map(str, shape)),
            "count": len(layers),
            "rank": _spread([layer["rank"] for layer in layers]),
            "energy": f"{sum(kept) / len(kept):.1%}" if kept else "",
        }


def _spread(ranks: Any) -> str:
    """One rank, or the least and the largest of several; a layer without one is dense."""
    values = ranks if isinstance(ranks, list) else [ranks]
    numbers = sorted({rank for rank in values if rank is not None})
    spread = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"{spread} (dense in {values.count(None)} of {len(values)} layers)" if None in values else spread


def _is_result(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and not key.startswith("parameters /")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _public(name: Any) -> str | None:
    """A name to publish: of a local path only the last part."""
    return name if name is None or is_hub_id(name) else Path(name).name


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)
