"""The scoring rules against a slow oracle written from the rules."""

import random
import string
from pathlib import Path

import evaluate
import pytest

from hf_fnl.tasks import metrics
from hf_fnl.tasks.metrics.squad_scores import exact_match_score, f1_score, score_squad

ARTICLES = ("a", "an", "the")


def oracle_words(text: str) -> list[str]:
    """Lower, drop punctuation, then drop every article that no word character touches."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    pieces, piece = [], ""
    for character in kept + " ":
        if character.isalnum() or character == "_":
            piece += character
        else:
            pieces += [" " if piece in ARTICLES else piece, character]
            piece = ""
    return "".join(pieces).split()


def oracle_exact(prediction: str, answer: str) -> float:
    return 1.0 if " ".join(oracle_words(prediction)) == " ".join(oracle_words(answer)) else 0.0


def oracle_f1(prediction: str, answer: str, version_2: bool) -> float:
    predicted, wanted = oracle_words(prediction), oracle_words(answer)
    if version_2 and (not predicted or not wanted):
        return 1.0 if predicted == wanted else 0.0
    left, hits = list(wanted), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            hits += 1
    if not hits:
        return 0.0
    precision, recall = hits / len(predicted), hits / len(wanted)
    return 2 * precision * recall / (precision + recall)


def oracle_version_2(texts, golds):
    """The figures of version 2.0."""

    def score(rule, id_):
        answers = [answer for answer in golds[id_] if oracle_words(answer)] or [""]
        return max(rule(texts[id_], answer) for answer in answers)

    rules = {"exact": oracle_exact, "f1": lambda text, gold: oracle_f1(text, gold, True)}
    groups = {"": list(golds), "HasAns_": [i for i in golds if golds[i]], "NoAns_": [i for i in golds if not golds[i]]}
    figures = {}
    for prefix, ids in groups.items():
        figures |= {prefix + name: 100 * sum(score(rule, i) for i in ids) / len(ids) for name, rule in rules.items()}
        figures[prefix + "total"] = len(ids)
    return figures


def random_text(rng: random.Random) -> str:
    words = ["the", "The", "a", "an", "An", "cat", "cats", "x", "42", "naïve", "U.S.", "the-end", "a_b", "“the”", "ß"]
    return rng.choice(["", " ", "\u00a0"]).join(
        rng.choice(words) + rng.choice(["", " ", ", ", "  ", "'s ", "\t"]) for _ in range(rng.randrange(5))
    )


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "f1"),
    [
        pytest.param("The Broncos!", "broncos", 1.0, 1.0, id="case, article, punctuation"),
        pytest.param("Denver Broncos", "the Denver team", 0.0, 0.5, id="half of the words"),
        pytest.param("a cat a cat cat", "cat cat dog", 0.0, 2 / 3, id="repeated words count as often as they occur"),
        pytest.param("dog", "cat", 0.0, 0.0, id="nothing shared"),
        pytest.param("anthem", "them", 0.0, 0.0, id="articles inside words stay"),
        pytest.param("the-end", "theend", 1.0, 1.0, id="punctuation goes before articles"),
        pytest.param("the", "a", 1.0, 0.0, id="nothing left of either"),
    ],
)
def test_hand_counted(prediction, answer, exact, f1):
    assert exact_match_score(prediction, answer) == exact
    assert f1_score(prediction, answer) == pytest.approx(f1)


@pytest.mark.parametrize(("prediction", "answer", "f1"), [("the", "", 1.0), ("cat", "", 0.0), ("", "cat", 0.0)])
def test_version_2_compares_empty_texts(prediction, answer, f1):
    assert f1_score(prediction, answer, version_2=True) == f1
    assert f1_score(prediction, answer) == 0.0


@pytest.mark.parametrize("version_2", [False, True])
def test_random_texts_equal_the_oracle(version_2):
    rng = random.Random(0)
    for _ in range(500):
        prediction, answer = random_text(rng), random_text(rng)
        assert exact_match_score(prediction, answer) == oracle_exact(prediction, answer)
        expected = oracle_f1(prediction, answer, version_2)
        assert f1_score(prediction, answer, version_2=version_2) == pytest.approx(expected, abs=1e-12)


def test_version_2_equals_the_oracle():
    rng = random.Random(0)
    ids = [f"q{number}" for number in range(61)]
    golds = {id_: [random_text(rng) for _ in range(rng.randrange(4))] for id_ in ids}
    texts = {id_: rng.choice([random_text(rng), "", *golds[id_]]) for id_ in ids}
    assert score_squad(texts, golds, version_2=True) == pytest.approx(oracle_version_2(texts, golds))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ({"other": "cat"}, {"q1": ["cat"]}), "1 of 1 questions have no prediction, first 'q1'", id="other ids"
        ),
        pytest.param(({"q1": "cat"}, {"q1": []}), "first: 'q1'.*version_2=True", id="no gold answer"),
    ],
)
def test_unusable_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_squad(*arguments)


@pytest.mark.parametrize(("version", "names"), [("v1", {"exact_match", "f1"}), ("v2", {"exact", "f1", "total"})])
def test_the_module_of_evaluate_scores_likewise(version, names):
    metric = evaluate.load(str(Path(metrics.__file__).parent / "squad_em_f1"), version)
    texts, golds = {"1": "the cat", "2": "dog"}, {"1": ["cat"], "2": ["a cat", "dogs"]}
    found = metric.compute(
        predictions=[{"id": id_, "prediction_text": text} for id_, text in texts.items()],
        references=[{"id": i, "answers": {"text": gold, "answer_start": [0] * len(gold)}} for i, gold in golds.items()],
    )
    assert found == score_squad(texts, golds, version_2=version == "v2")
    assert names <= set(found)
    with pytest.raises(ValueError, match='must be "v1" or "v2", got \'v3\''):
        evaluate.load(str(Path(metrics.__file__).parent / "squad_em_f1"), "v3")
