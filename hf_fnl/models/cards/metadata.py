"""The head of a model card, which the Hub reads: task, tags, base model, data sets and results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn
from transformers import AutoModelForImageClassification, MarianConfig
from transformers.modelcard import TASK_MAPPING

from hf_fnl.layers import factorized_layers
from hf_fnl.models.cards.facts import TRAINED_ON, is_hub_id, model_ranks
from hf_fnl.models.cards.record import Record


@dataclass(frozen=True)
class _Evaluation:
    """Metrics of a task, and where the settings of a run say what they were measured on."""

    task: str
    data: Sequence[str]
    split: str
    limit: str
    metrics: Mapping[str, tuple[str, str]]  # the Hub's identifier, and a name in words


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
    _Evaluation(
        task="image-classification",
        data=("eval_dataset", "dataset"),
        split="eval_split",
        limit="max_eval_images",
        metrics={"eval_accuracy": ("accuracy", "Accuracy")},
    ),
)


def card_metadata(
    model: nn.Module, record: Record, *, title: str, name: str | None, stated: ModelCardData
) -> ModelCardData:
    """What the Hub can be told about a model.

    Args:
        model: The model.
        record: How it was made.
        title: Name of the model in its list of results.
        name: Id on the Hub that it will have, which is not taken for its base.
        stated: Comes before what is read off; its tags are added to ours.
    """
    given = {key: value for key, value in vars(stated).items() if value is not None}
    task = given.get("pipeline_tag") or ("translation" if "languages" in record.settings else task_of(model))
    origins = [*record.origins, getattr(model, "name_or_path", "")]
    measured = list(_measured(record, task))
    derived = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "base_model": next((origin for origin in origins if is_hub_id(origin) and origin != name), None),
        "datasets": [data for key in TRAINED_ON if is_hub_id(data := record.settings.get(key))] or None,
        "metrics": [evaluation.metrics[key][0] for evaluation, key, _ in measured] or None,
    }
    if results := [result for found in measured if (result := _result(record, *found)) is not None]:
        derived |= {"model_name": title, "eval_results": results}
    tags = ["hf_fnl"]
    if record.factorization or model_ranks(model) or factorized_layers(model):
        tags.append("low-rank")
    if record.settings.get("optim") == "flambe":
        tags.append("flambe")
    return ModelCardData(**{**derived, **given, "tags": tags + given.get("tags", [])})


def task_of(model: nn.Module) -> str | None:
    """The Hub's task for the head of a model, if there is exactly one."""
    if isinstance(getattr(model, "config", None), MarianConfig):
        return "translation"
    if type(model) in AutoModelForImageClassification._model_mapping.values():
        return "image-classification"
    name = getattr(model, "dense_class", type(model)).__name__
    tasks = [
        task
        for task, heads in TASK_MAPPING.items()
        if task != "text2text-generation"  # which the Hub has given up
        and any(name in (head if isinstance(head, tuple | list) else (head,)) for head in heads.values())
    ]
    return tasks[0] if len(tasks) == 1 else None


def _measured(record: Record, task: str | None) -> Iterator[tuple[_Evaluation, str, float]]:
    last = {key.rpartition(" / ")[2]: value for key, value in record.metrics.items()}  # of several phases, the last
    for evaluation in _EVALUATIONS:
        for key in evaluation.metrics:
            if task in (None, evaluation.task) and _is_finite(last.get(key)):
                yield evaluation, key, last[key]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max


def _result(record: Record, evaluation: _Evaluation, key: str, value: float) -> EvalResult | None:
    """A row of the Hub's ``model-index``; of a part of a data set, or of a file, it has none."""
    data = next((name for option in evaluation.data if (name := record.settings.get(option))), None)
    if not is_hub_id(data) or record.settings.get(evaluation.limit) is not None:
        return None
    metric, words = evaluation.metrics[key]
    return EvalResult(
        task_type=evaluation.task,
        dataset_type=data,
        dataset_name=data.rpartition("/")[2],
        dataset_split=record.settings.get(evaluation.split),
        metric_type=metric,
        metric_name=words,
        metric_value=value,
    )
