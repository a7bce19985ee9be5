"""Exact match and F1 by the rules of the official SQuAD evaluation scripts, versions 1.1 and 2.0.

Sources: Rajpurkar et al. 2016 (https://arxiv.org/abs/1606.05250) and Rajpurkar et al. 2018
(https://arxiv.org/abs/1806.03822), with the scripts published at https://rajpurkar.github.io/SQuAD-explorer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

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
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    version_2: bool = False,
    no_answer_scores: Mapping[str, float] | None = None,
    no_answer_threshold: float = 1.0,
) -> dict[str, float]:
    """Score predicted answers against gold answers: for each question the best over its gold answers, then the mean.

    Args:
        predictions: Predicted text by question id; other ids than those of ``references`` are ignored.
        references: Gold texts by question id; none for a question that has no answer (version 2.0).
        version_2: Follow the rules of version 2.0. A question without prediction scores 0 under version 1.1 and is
            left out under version 2.0.
        no_answer_scores: How likely a question has no answer, on any scale (version 2.0). Also asks for the search of
            the threshold that would have been best.
        no_answer_threshold: A question whose no-answer score is above it counts as predicted to have no answer.

    Returns:
        Percentages. Version 1.1: ``exact_match``, ``f1``. Version 2.0: ``exact``, ``f1``, ``total``, the same three
        under ``HasAns_`` and ``NoAns_`` where there are such questions, and with ``no_answer_scores`` ``best_exact``,
        ``best_exact_thresh``, ``best_f1`` and ``best_f1_thresh``.

    Raises:
        ValueError: If no prediction belongs to a question, under version 1.1 a question has no gold answer, or
            ``no_answer_scores`` lacks a predicted question.
    """
    if not predictions.keys() & references.keys():
        raise ValueError(
            f"none of the {len(predictions)} predictions has the id of one of the {len(references)} questions; "
            "give predictions made for this data set"
        )
    if version_2:
        return _score_version_2(predictions, references, no_answer_scores, no_answer_threshold)
    unanswerable = [id_ for id_, answers in references.items() if not answers]
    if unanswerable:
        raise ValueError(
            f"{len(unanswerable)} of {len(references)} questions have no gold answer (first: {unanswerable[0]!r}), "
            "which SQuAD 1.1 does not know; score with version_2=True"
        )
    exact, f1 = _best_scores(predictions, references, version_2=False)
    return {"exact_match": _percent(exact.values(), len(references)), "f1": _percent(f1.values(), len(references))}


def _best_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, version_2: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Return exact match and F1 of every predicted question, each the best over its gold answers.

    Version 2.0 sets aside gold answers that are empty once normalised; the empty text stands for none at all.
    """
    exact, f1 = {}, {}
    for id_, answers in references.items():
        if id_ not in predictions:
            continue
        if version_2:
            answers = [answer for answer in answers if normalize_answer(answer)] or [""]
        exact[id_] = max(exact_match_score(predictions[id_], answer) for answer in answers)
        f1[id_] = max(f1_score(predictions[id_], answer, version_2=version_2) for answer in answers)
    return exact, f1


def _score_version_2(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float] | None,
    threshold: float,
) -> dict[str, float]:
    """Score by version 2.0: overall, over questions with and without answers, and at the best thresholds."""
    nullness = dict.fromkeys(references, 0.0) if no_answer_scores is None else no_answer_scores
    missing = [id_ for id_ in references if id_ in predictions and id_ not in nullness]
    if missing:
        raise ValueError(f"no_answer_scores lacks {len(missing)} predicted questions, first {missing[0]!r}")
    raw = dict(zip(("exact", "f1"), _best_scores(predictions, references, version_2=True), strict=True))
    final = {
        name: {id_: float(not references[id_]) if nullness[id_] > threshold else score for id_, score in scores.items()}
        for name, scores in raw.items()
    }
    scored = list(final["exact"])
    groups = {
        "": scored,
        "HasAns_": [id_ for id_ in scored if references[id_]],
        "NoAns_": [id_ for id_ in scored if not references[id_]],
    }
    result: dict[str, float] = {}
    for prefix, ids in groups.items():
        if ids:
            for name, scores in final.items():
                result[prefix + name] = _percent([scores[id_] for id_ in ids], len(ids))
            result[prefix + "total"] = len(ids)
    if no_answer_scores is not None:
        for name, scores in raw.items():
            best = _best_threshold(scores, predictions, references, no_answer_scores)
            result[f"best_{name}"], result[f"best_{name}_thresh"] = best
    return result


def _best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float],
) -> tuple[float, float]:
    """Return the best percentage that a threshold on the no-answer scores could reach, and the lowest such threshold.

    Walks up the questions in the order of their no-answer score. At first none is answered, so each without an answer
    counts 1; answering the next adds its score, or takes 1 away where it has no answer and a text was predicted.
    """
    total = best = float(sum(not answers for answers in references.values()))
    threshold = 0.0
    for id_ in sorted(no_answer_scores, key=no_answer_scores.__getitem__):
        if id_ not in scores:
            continue
        total += scores[id_] if references[id_] else -float(bool(predictions[id_]))
        if total > best:
            best, threshold = total, no_answer_scores[id_]
    return 100.0 * best / len(scores), threshold


def _percent(scores: Collection[float], count: int) -> float:
    return 100.0 * sum(scores) / count
