"""The scoring rules against a slow oracle written from the rules, and the ``evaluate`` module that applies them."""

import json
import random
import string
from pathlib import Path

import evaluate
import pytest

from hf_fnl.tasks import metrics
from hf_fnl.tasks.metrics import exact_match_score, f1_score, score_squad

FOLDER = Path(metrics.__file__).parent / "squad_em_f1"
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


def oracle_version_2(texts, golds, nullness, threshold):
    """The figures of version 2.0, thresholds tried one by one from scratch."""

    def score(rule, id_):
        answers = [answer for answer in golds[id_] if oracle_words(answer)] or [""]
        return max(rule(texts[id_], answer) for answer in answers)

    def average(name, ids):
        rows = [not golds[id_] if nullness[id_] > threshold else score(rules[name], id_) for id_ in ids]
        return 100 * sum(rows) / len(rows)

    rules = {"exact": oracle_exact, "f1": lambda text, gold: oracle_f1(text, gold, True)}
    groups = {"": list(golds), "HasAns_": [i for i in golds if golds[i]], "NoAns_": [i for i in golds if not golds[i]]}
    figures = {}
    for prefix, ids in groups.items():
        if ids:
            figures |= {prefix + name: average(name, ids) for name in rules} | {prefix + "total": len(ids)}
    ranked = sorted(nullness, key=nullness.get)
    for name, rule in rules.items():
        totals = []
        for count in range(len(ranked) + 1):
            answered, silent = ranked[:count], ranked[count:]
            gained = sum(score(rule, id_) for id_ in answered if golds[id_])
            spared = sum(not texts[id_] for id_ in answered if not golds[id_])
            totals.append(gained + spared + sum(not golds[id_] for id_ in silent))
        best = max(totals)
        place = next(count for count, total in enumerate(totals) if total > best - 1e-9)
        figures[f"best_{name}"] = 100 * best / len(ranked)
        figures[f"best_{name}_thresh"] = nullness[ranked[place - 1]] if place else 0.0
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


@pytest.mark.parametrize("seed", range(3))
def test_version_2_equals_the_oracle(seed):
    rng = random.Random(seed)
    ids = [f"q{number}" for number in range(23)]
    golds = {id_: [random_text(rng) for _ in range(rng.randrange(4))] for id_ in ids}
    texts = {id_: rng.choice([random_text(rng), *golds[id_]]) for id_ in ids}
    nullness = {id_: rng.choice([rng.uniform(-3, 3), 0.5]) for id_ in ids}
    scores = score_squad(texts, golds, version_2=True, no_answer_scores=nullness, no_answer_threshold=0.5)
    assert scores == pytest.approx(oracle_version_2(texts, golds, nullness, 0.5))


def test_real_answers_equal_the_oracle(shared_data):
    content = json.loads((shared_data / "squad" / "dev-v1.1.json").read_text(encoding="utf-8"))
    golds, texts = {}, {}
    for article in content["data"][::4]:
        for paragraph in article["paragraphs"][::6]:
            for number, question in enumerate(paragraph["qas"]):
                answers = [answer["text"] for answer in question["answers"]]
                golds[question["id"]] = answers
                texts[question["id"]] = [answers[-1], paragraph["context"][:40], answers[0] + " or so"][number % 3]
    exact = [max(oracle_exact(texts[id_], answer) for answer in golds[id_]) for id_ in golds]
    f1 = [max(oracle_f1(texts[id_], answer, False) for answer in golds[id_]) for id_ in golds]
    expected = {"exact_match": 100 * sum(exact) / len(exact), "f1": 100 * sum(f1) / len(f1)}
    assert score_squad(texts, golds) == pytest.approx(expected)
    assert 30 < expected["exact_match"] < expected["f1"] < 90


def test_a_missing_prediction_counts_zero_in_version_1_and_is_left_out_in_version_2():
    golds, texts = {"q1": ["cat"], "q2": ["dog"]}, {"q1": "cat", "other": "cow"}
    assert score_squad(texts, golds) == {"exact_match": 50.0, "f1": 50.0}
    assert score_squad(texts, golds, version_2=True)["exact"] == 100.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(({"other": "cat"}, {"q1": ["cat"]}), "none of the 1 predictions has the id", id="other ids"),
        pytest.param(({"q1": "cat"}, {"q1": []}), "first: 'q1'.*version_2=True", id="no gold answer"),
    ],
)
def test_unusable_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_squad(*arguments)


def test_incomplete_no_answer_scores():
    with pytest.raises(ValueError, match="lacks 1 predicted questions, first 'q2'"):
        score_squad({"q1": "", "q2": ""}, {"q1": [], "q2": []}, version_2=True, no_answer_scores={"q1": 1.0})


def test_module_version_1_equals_the_functions():
    predictions = [{"id": "q2", "prediction_text": "a dog"}, {"id": "q1", "prediction_text": "black cats"}]
    references = [
        {"id": "q1", "answers": {"text": ["cats", "the cat"], "answer_start": [1, 1]}},
        {"id": "q2", "answers": {"text": ["dog"], "answer_start": [1]}},
    ]
    scores = evaluate.load(str(FOLDER)).compute(predictions=predictions, references=references)
    assert scores == pytest.approx({"exact_match": 50.0, "f1": 100 * (2 / 3 + 1) / 2})


def test_module_version_2_equals_the_functions():
    golds = {"q1": ["cat"], "q2": [], "q3": ["dog"]}
    texts, nullness = {"q1": "cat", "q2": "cow", "q3": "dog"}, {"q1": -1.0, "q2": 0.7, "q3": 0.25}
    scores = evaluate.load(str(FOLDER), "v2").compute(
        predictions=[{"id": i, "prediction_text": texts[i], "no_answer_probability": nullness[i]} for i in texts],
        references=[{"id": i, "answers": {"text": golds[i], "answer_start": [0] * len(golds[i])}} for i in golds],
        no_answer_threshold=0.0,
    )
    expected = score_squad(texts, golds, version_2=True, no_answer_scores=nullness, no_answer_threshold=0.0)
    assert scores == pytest.approx(expected)
    assert (scores["exact"], scores["best_exact"], scores["best_exact_thresh"]) == (pytest.approx(200 / 3), 100.0, 0.25)


def test_module_knows_its_configurations():
    assert evaluate.load(str(FOLDER), "v2").config_name == "v2"
    with pytest.raises(ValueError, match='must be "v1" or "v2", got \'v3\''):
        evaluate.load(str(FOLDER), "v3")
