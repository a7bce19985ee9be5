"""Predicted answers to SQuAD questions: written in the official JSON, and scored by the ``evaluate`` metric beside."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
from datasets import Dataset

from hf_fnl.utils.files import write_json

_METRIC_FOLDER = Path(__file__).with_name("squad_em_f1")


@dataclass(frozen=True)
class SquadPredictions:
    """Answers by question id.

    Args:
        predictions: The answer to each question; empty where version 2.0 predicts that there is none.
        nbest: The best answers with ``text``, ``probability``, ``start_logit`` and ``end_logit``, best first.
        null_odds: Score of no answer minus that of the best answer (version 2.0; empty under version 1.1).
        null_score_diff_threshold: The threshold on ``null_odds`` that ``predictions`` was made with.
    """

    predictions: Mapping[str, str]
    nbest: Mapping[str, Sequence[Mapping[str, Any]]]
    null_odds: Mapping[str, float]
    null_score_diff_threshold: float = 0.0


def is_version_2(examples: Dataset) -> bool:
    """Whether some question has no answer, which only SQuAD 2.0 knows."""
    return not all(answers["text"] for answers in examples["answers"])


def write_predictions(folder: str | os.PathLike[str], predictions: SquadPredictions) -> None:
    """Write ``predictions.json`` in the official format, ``nbest_predictions.json`` and any ``null_odds.json``.

    Each file appears whole or not at all; ``folder`` is made if missing.
    """
    contents: dict[str, Mapping[str, Any]] = {
        "predictions": predictions.predictions,
        "nbest_predictions": predictions.nbest,
    }
    if predictions.null_odds:
        contents["null_odds"] = predictions.null_odds
    for name, content in contents.items():
        write_json(Path(folder) / f"{name}.json", content)


def load_squad_metric(*, version_2: bool = False) -> evaluate.Metric:
    """Load the ``evaluate`` metric that ships with this package, without the Hub."""
    return evaluate.load(str(_METRIC_FOLDER), "v2" if version_2 else "v1", keep_in_memory=True)


def score_predictions(
    examples: Dataset, predictions: SquadPredictions, *, version_2: bool | None = None
) -> dict[str, float]:
    """Score answers by the official rules; the names are those of :func:`~hf_fnl.tasks.metrics.score_squad`.

    With ``null_odds``, ``best_exact_thresh`` and ``best_f1_thresh`` are the values of ``null_score_diff_threshold``
    that would have scored best on these questions.

    Args:
        examples: Questions as :func:`hf_fnl.tasks.squad.load_squad` gives them.
        predictions: Their answers; of ``nbest`` and ``null_odds``, either both or none.
        version_2: Rules of version 2.0 instead of 1.1. Default: whether some question has no answer.

    Raises:
        ValueError: If a question has no prediction.
    """
    ids = list(examples["id"])
    missing = [id_ for id_ in ids if id_ not in predictions.predictions]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} questions have no prediction, first {missing[0]!r}; "
            "give predictions made for these questions"
        )
    references = [{"id": id_, "answers": answers} for id_, answers in zip(ids, examples["answers"], strict=True)]
    version_2 = is_version_2(examples) if version_2 is None else version_2
    metric = load_squad_metric(version_2=version_2)
    if not version_2:
        texts = [{"id": id_, "prediction_text": predictions.predictions[id_]} for id_ in ids]
        return metric.compute(predictions=texts, references=references)
    scores = metric.compute(
        predictions=[_with_null_odds(id_, predictions) for id_ in ids],
        references=references,
        no_answer_threshold=predictions.null_score_diff_threshold,
    )
    return {name: score for name, score in scores.items() if predictions.null_odds or not name.startswith("best_")}


def _with_null_odds(id_: str, predictions: SquadPredictions) -> dict[str, Any]:
    """What the version 2.0 metric takes: the best text, also where no answer won over it, for the threshold search."""
    text, null_odds = predictions.predictions[id_], predictions.null_score_diff_threshold
    if predictions.null_odds:
        text = next(answer["text"] for answer in predictions.nbest[id_] if answer["text"])
        null_odds = predictions.null_odds[id_]
    return {"id": id_, "prediction_text": text, "no_answer_probability": null_odds}
