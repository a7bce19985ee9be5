"""A name that is no folder: said at once, with whether the Hub could be asked."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from hf_fnl.utils.hub import check_source


@pytest.fixture
def hub(monkeypatch):
    """Sets what the Hub answers; returns what it was asked."""

    def answers(error: Exception | None) -> list[str]:
        asked = []

        def repo_info(self, repo_id, *, repo_type, timeout):
            asked.append(f"{repo_type} {repo_id}")
            if error is not None:
                raise error

        monkeypatch.setattr("hf_fnl.utils.hub.HfApi.repo_info", repo_info)
        return asked

    return answers


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "no folder someone/model, and the Hub could not be asked: no route"),
        (HFValidationError("two slashes"), "the Hub has no model of this name"),
        (RepositoryNotFoundError("404", response=Mock()), "the Hub has no model of this name"),
    ],
    ids=["no network", "no id", "unknown"],
)
def test_a_name_that_neither_a_folder_nor_the_hub_has(hub, error, message):
    hub(error)
    with pytest.raises(FileNotFoundError, match=message):
        check_source("someone/model")


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_the_hub_has_is_asked_for_once(hub, kind):
    asked = hub(None)
    check_source("someone/name", kind)
    assert asked == [f"{kind} someone/name"]


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "~/no/such/folder"])
def test_a_path_is_never_asked_for(hub, source):
    asked = hub(None)
    with pytest.raises(FileNotFoundError, match=f"there is no folder {source}"):
        check_source(source)
    assert asked == []


def test_what_lies_here_or_in_the_cache_is_not_asked_for(hub, tmp_path, monkeypatch):
    asked = hub(None)
    monkeypatch.setattr("hf_fnl.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--someone--cached").mkdir()
    check_source("someone/cached")
    check_source(tmp_path)
    assert asked == []
