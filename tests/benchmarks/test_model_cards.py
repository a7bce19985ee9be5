"""The cards of our own models are what the results of their runs give, and no hand has changed them."""

from __future__ import annotations

import re

import pytest

from benchmarks.harness.record import ROOT
from benchmarks.model_cards import main

FOLDER = ROOT / "model_cards"
NAMES = sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    main(["--out", str(folder)])
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_there_is_a_card_of_each_model_and_the_readme_lists_it(written):
    assert sorted(written) == NAMES, "run python -m benchmarks.model_cards"
    listed = re.findall(r"\]\(([\w.-]+\.md)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_as_its_results_give_it(written, name):
    assert (FOLDER / name).read_text(encoding="utf-8") == written[name], "run python -m benchmarks.model_cards"
    assert not re.search(r"[\s`\"](/|~/)\w", written[name]), "a path that nobody else has"


@pytest.mark.parametrize("name", NAMES)
def test_the_results_that_a_card_names_are_there(name):
    (source,) = re.findall("All figures: `(.*)`", (FOLDER / name).read_text(encoding="utf-8"))
    assert (ROOT / source).is_file()
