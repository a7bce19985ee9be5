"""Exact match and F1 by the rules of the official SQuAD evaluation scripts, versions 1.1 and 2.0.

Sources: Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250) and Rajpurkar et al. 2018
(https://arxiv.org/abs/1806.03822), with the scripts published at https://rajpurkar.github.io/SQuAD-explorer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower ``text``, then remove ASCII punctuation, English articles and superfluous white space, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match_score(prediction: str, answer: str) -> float:
    """Return 1.0 if both texts are the same once normalised, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1_score(prediction: str, answer: str, *, version_2: bool = False) -> float:
    """Return the harmonic mean of precision and recall over the words of two normalised texts, counted as bags.

    Args:
        prediction: Text to judge.
        answer: Text to compare with.
        version_2: Let two texts without words score 1 against each other, as in version 2.0, instead of 0.
    """
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if version_2 and not (predicted and wanted):
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def score_squad(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, version_2: bool = False
) -> dict[str, float]:
    """Score predicted answers against gold answers: for each question the best over its gold answers, then the mean.

    Args:
        predictions: Predicted text by question id, empty for no answer; other ids than those of ``references`` are
            ignored.
        references: Gold texts by question id; none for a question that has no answer (version 2.0).
        version_2: Follow the rules of version 2.0, in which gold answers that are empty once normalised do not count.

    Returns:
        Percentages. Version 1.1: ``exact_match``, ``f1``. Version 2.0: ``exact``, ``f1``, ``total``, and the same three
        under ``HasAns_`` and ``NoAns_`` where there are such questions.

    Raises:
        ValueError: If a question has no prediction, or under version 1.1 no gold answer.
    """
    if missing := [id_ for id_ in references if id_ not in predictions]:
        raise ValueError(
            f"{len(missing)} of {len(references)} questions have no prediction, first {missing[0]!r}; "
            "give predictions made for these questions"
        )
    unanswerable = [id_ for id_, answers in references.items() if not answers]
    if unanswerable and not version_2:
        raise ValueError(
            f"{len(unanswerable)} of {len(references)} questions have no gold answer (first: {unanswerable[0]!r}), "
            "which SQuAD 1.1 does not know; score with version_2=True"
        )
    exact, f1 = {}, {}
    for id_, answers in references.items():
        if version_2:  # the empty text stands for no answer
            answers = [answer for answer in answers if normalize_answer(answer)] or [""]
        exact[id_] = max(exact_match_score(predictions[id_], answer) for answer in answers)
        f1[id_] = max(f1_score(predictions[id_], answer, version_2=version_2) for answer in answers)
    if not version_2:
        return {"exact_match": _percent(exact, references), "f1": _percent(f1, references)}
    groups = {
        "": list(references),
        "HasAns_": [id_ for id_ in references if references[id_]],
        "NoAns_": unanswerable,
    }
    result: dict[str, float] = {}
    for prefix, ids in groups.items():
        if ids:
            result[f"{prefix}exact"], result[f"{prefix}f1"] = _percent(exact, ids), _percent(f1, ids)
            result[f"{prefix}total"] = len(ids)
    return result


def _percent(scores: Mapping[str, float], ids: Mapping[str, object] | Sequence[str]) -> float:
    return 100.0 * sum(scores[id_] for id_ in ids) / len(ids)
