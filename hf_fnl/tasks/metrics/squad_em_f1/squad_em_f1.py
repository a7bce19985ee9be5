"""``evaluate`` module for SQuAD: exact match and F1. Load it with ``evaluate.load(folder, "v1")`` or ``"v2"``."""

from typing import Any

import evaluate
from datasets import Features, List, Value

from hf_fnl.tasks.metrics.squad_scores import score_squad

_DESCRIPTION = "Exact match and F1 of extractive question answering, by the rules of the official SQuAD scripts."

_INPUTS = """
Args:
    predictions: One ``{"id", "prediction_text"}`` a question, the text empty where it says that there is no answer.
    references: One ``{"id", "answers": {"text", "answer_start"}}`` a question, the texts empty where it has no answer.
Returns:
    Percentages: "exact_match" and "f1"; for "v2" "exact", "f1", "total", and those of questions with and without
    answers ("HasAns_", "NoAns_").
"""

_CITATION = """
@inproceedings{rajpurkar2016squad,
  title = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle = {EMNLP}, year = {2016}
}
@inproceedings{rajpurkar2018know,
  title = {Know What You Don't Know: Unanswerable Questions for {SQuAD}},
  author = {Rajpurkar, Pranav and Jia, Robin and Liang, Percy},
  booktitle = {ACL}, year = {2018}
}
"""


class SquadEmF1(evaluate.Metric):
    """Exact match and F1; the configuration name, "v1" (default) or "v2", picks the version of the rules."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "v1", "v2"):
            raise ValueError(f'the configuration of squad_em_f1 must be "v1" or "v2", got {self.config_name!r}')
        prediction = {"id": Value("string"), "prediction_text": Value("string")}
        answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=Features({"predictions": prediction, "references": {"id": Value("string"), "answers": answers}}),
        )

    def _compute(self, predictions: list[dict[str, Any]], references: list[dict[str, Any]]) -> dict[str, float]:
        texts = {prediction["id"]: prediction["prediction_text"] for prediction in predictions}
        answers = {reference["id"]: reference["answers"]["text"] for reference in references}
        return score_squad(texts, answers, version_2=self.config_name == "v2")
