"""The corpus and the questions made from the language reference inside CPython."""

import sys

import pytest

from hf_fnl.tasks import embedded
from hf_fnl.tasks.embedded import embedded_documents, embedded_squad

SPLITS = ("train", "validation")

PAGE = """The "del" statement
*******************

Deletion is recursively defined very similar to the way assignment is de-
fined, and a word is joined at the built-
in hyphen [3].

   del_stmt ::= "del" target_list

* The *target* list is deleted from left to right.

   for target in targets:
       del target

   >>> del a.b  # the name of the attribute is of a kind
"""


def paragraphs_of(split: str) -> list[dict]:
    return [paragraph for article in embedded_squad(split)["data"] for paragraph in article["paragraphs"]]


def test_page_becomes_prose():
    assert list(embedded._paragraphs(PAGE)) == [
        'The "del" statement',
        "Deletion is recursively defined very similar to the way assignment is de-fined, "
        "and a word is joined at the built-in hyphen.",
        "The target list is deleted from left to right.",
    ]


def test_documents_are_many_and_the_same_on_every_call_and_repeat_nothing():
    documents = embedded_documents()
    embedded._documents.cache_clear()
    assert embedded_documents() == documents
    assert len(documents) >= 50
    assert sum(len(document.split()) for document in documents) >= 30_000
    paragraphs = [paragraph for document in documents for paragraph in document.split("\n\n")]
    prose = [paragraph for paragraph in paragraphs if embedded._is_prose(paragraph)]
    assert len(prose) == len(set(prose))
    assert not any(mark in text for text in paragraphs for mark in ("\n", "::=", ">>>", "***", "===", "  "))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        pytest.param(
            "Changed in version 3.11: Starred elements are now allowed.",
            [("In which version: Starred elements are now allowed?", "3.11")],
            id="version",
        ),
        pytest.param(
            "If the sequence is empty, it is left alone.",
            [("What happens if the sequence is empty?", "it is left alone")],
            id="condition",
        ),
        pytest.param(
            'The "pass" statement does nothing at all.',
            [
                ('What does the "pass" statement do?', "does nothing at all"),
                ("Which keyword is missing: The ___ statement does nothing at all?", "pass"),
            ],
            id="statement",
        ),
        pytest.param(
            "A block is a piece of program text.",
            [("What is said of a block?", "is a piece of program text")],
            id="description",
        ),
        pytest.param(
            'Calls "__len__()" or "len()".',
            [
                ('Which method is missing: Calls ___ or "len()"?', "__len__()"),
                ('Which function is missing: Calls "__len__()" or ___?', "len()"),
            ],
            id="two terms",
        ),
        pytest.param('So "else" follows "else".', [], id="a term quoted twice would give itself away"),
        pytest.param("Nothing to ask here.", [], id="no template"),
    ],
)
def test_templates(sentence, expected):
    questions = embedded._sentence_questions(sentence)
    assert [(question, sentence[start:end]) for question, start, end in questions] == expected


@pytest.mark.parametrize(("split", "least"), [("train", 500), ("validation", 50)])
def test_every_answer_stands_in_its_context(split, least):
    paragraphs = paragraphs_of(split)
    for paragraph in paragraphs:
        for question in paragraph["qas"]:
            (answer,) = question["answers"]
            start = answer["answer_start"]
            assert paragraph["context"][start : start + len(answer["text"])] == answer["text"] != ""
    assert sum(len(paragraph["qas"]) for paragraph in paragraphs) >= least


def test_splits_share_nothing():
    contexts = {split: {paragraph["context"] for paragraph in paragraphs_of(split)} for split in SPLITS}
    assert contexts["train"].isdisjoint(contexts["validation"])
    ids = [question["id"] for split in SPLITS for paragraph in paragraphs_of(split) for question in paragraph["qas"]]
    assert len(ids) == len(set(ids))


def test_unknown_split():
    with pytest.raises(ValueError, match='"train" or "validation", got \'test\''):
        embedded_squad("test")


def test_python_without_the_reference(monkeypatch):
    embedded._documents.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="give a Hub dataset or files"):
        embedded_documents()
