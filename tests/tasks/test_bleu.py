"""BLEU: worked values, signatures, detokenization."""

from __future__ import annotations

import math
import sys

import pytest

from hf_fnl.tasks.metrics.bleu import bleu_scores, detokenize

TOKENS = ["i &apos;m sure she never found the dog , because i took the sign .", "that is it !"]


def test_equal_texts_score_100_and_say_how_they_were_counted():
    scores = bleu_scores(TOKENS, TOKENS, detokenize_lang="en")
    assert scores["bleu"] == scores["tokenized_bleu"] == pytest.approx(100)
    assert "tok:13a" in scores["bleu_signature"]
    assert "tok:none" in scores["tokenized_bleu_signature"]
    assert all("version:" in scores[f"{name}_signature"] for name in ("bleu", "tokenized_bleu"))


def test_a_worked_value():
    # Of 6, 5, 4, 3 n-grams 5, 3, 2, 1 are right; six words for seven.
    scores = bleu_scores(["the cat sat on the mat"], ["the cat sat on a red mat"])
    precisions = [5 / 6, 3 / 5, 2 / 4, 1 / 3]
    expected = 100 * math.exp(1 - 7 / 6) * math.prod(precisions) ** 0.25
    assert scores["tokenized_bleu"] == pytest.approx(expected)


def test_tokenized_bleu_takes_words_as_they_stand():
    scores = bleu_scores(["we know the old way ."], ["we know the old way."])
    assert scores["bleu"] == pytest.approx(100)
    assert scores["tokenized_bleu"] < 100


def test_detokenization_undoes_moses():
    plain = ["i'm sure she never found the dog, because i took the sign.", "that is it!"]
    assert detokenize(TOKENS, "en") == plain
    scores = bleu_scores(TOKENS, [TOKENS[0], "that was it !"], detokenize_lang="en")
    assert scores["bleu"] == bleu_scores(plain, [plain[0], "that was it!"])["bleu"]


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], ["a", "b"]), ([], [])], ids=["unequal", "none"])
def test_bad_input(hypotheses, references):
    with pytest.raises(ValueError, match=f"needed, got {len(hypotheses)} and {len(references)}"):
        bleu_scores(hypotheses, references)


@pytest.mark.parametrize("module", ["sacrebleu.metrics", "sacremoses"])
def test_the_extra_of_a_package_that_is_missing_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'by {module.partition(".")[0]}: pip install "hf_fnl\[tasks\]"'):
        bleu_scores(["one"], ["one"], detokenize_lang="en")
