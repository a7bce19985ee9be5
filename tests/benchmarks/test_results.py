"""Results say which commit made them: those that lie in the repository, and all that will be written."""

from __future__ import annotations

import ast
import json
import re
import subprocess

import pytest

import benchmarks.harness.grids as grids
from benchmarks.harness.grids import run_once
from benchmarks.harness.record import ROOT, command_line, revision, write_result

HASH = "[0-9a-f]{40}"


@pytest.fixture
def checkout(tmp_path):
    """A repository of one commit, and what runs git in it."""

    def git(*words: str) -> str:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        command = ["git", *identity, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for file in ("hf_fnl/a.py", "benchmarks/b.py", "benchmarks/results/r.json", "README.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path, git


def test_no_result_names_a_folder_of_the_machine_that_made_it():
    files = [p for p in (ROOT / "benchmarks" / "results").rglob("*") if p.suffix in (".json", ".md")]
    assert len(files) > 30
    assert [p.name for p in files if re.search(r"""[ "'=]/(work|root|home|tmp|mnt|Users)/""", p.read_text())] == []
    assert command_line("a.b", ["--out", "/one/two", "c/d"]) == "python -m a.b --out two c/d"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_every_result_names_the_commit_that_made_it_or_holds_it(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    if "committed_in" in result:  # made before results recorded their commit: the first that has these figures
        assert re.fullmatch(HASH, result["committed_in"])
    elif result["commit"] is None:
        assert result["commit_unknown"]
    else:
        assert re.fullmatch(f"{HASH}(-dirty)?", result["commit"])


def test_nothing_but_the_record_writes_results():
    writers = set()
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            dumps = isinstance(node, ast.Attribute) and node.attr == "dump" and ast.unparse(node.value) == "json"
            if "write_json" in names or dumps:
                writers.add(path.relative_to(ROOT).as_posix())
    # The runner of grids writes tables of what ran; each result in them names the commit of its training.
    assert writers == {"benchmarks/harness/record.py", "benchmarks/grid_runs.py"}


@pytest.mark.parametrize(
    ("file", "mark"),
    [
        pytest.param(None, "", id="unchanged"),
        pytest.param("hf_fnl/a.py", "-dirty", id="code"),
        pytest.param("run_scripts/new.py", "-dirty", id="new-code"),
        pytest.param("benchmarks/results/r.json", "", id="results"),
        pytest.param("README.md", "", id="text"),
    ],
)
def test_a_commit_is_marked_where_the_code_differs_from_it(checkout, file, mark):
    root, git = checkout
    if file:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text("2")
    assert revision(root) == {"commit": git("rev-parse", "HEAD") + mark}


def test_outside_of_a_checkout_there_is_a_reason(tmp_path, monkeypatch, checkout):
    root, _ = checkout
    assert revision(root / "hf_fnl") == {"commit": None, "commit_unknown": "hf_fnl is no checkout of its own"}
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (outside := tmp_path.parent / f"{tmp_path.name}-outside").mkdir()
    found = revision(outside)
    assert found["commit"] is None
    assert "not a git repository" in found["commit_unknown"]
    monkeypatch.setenv("PATH", str(outside))
    assert revision(root) == {"commit": None, "commit_unknown": "git is not installed"}


def test_a_result_is_written_with_its_commit_and_keeps_one_of_its_own(tmp_path):
    path = tmp_path / "r.json"
    assert write_result(path, {"figure": 3}) == {**revision(), "figure": 3}
    assert write_result(path, {"commit": "abc", "figure": 3}) == {"commit": "abc", "figure": 3}
    assert json.loads(path.read_text()) == {"commit": "abc", "figure": 3}


def test_a_training_that_goes_on_after_another_commit_names_both(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(f"import pathlib, sys; p = pathlib.Path({str(tmp_path)!r}, 'run', 'metrics.json')\n")
    commits = iter(["one", "two", "two"])
    monkeypatch.setattr(grids, "revision", lambda: {"commit": next(commits)})
    done = tmp_path / "run" / "metrics.json"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="failed"):
            run_once([str(script)], done)
    script.write_text(script.read_text() + "p.parent.mkdir(); p.write_text('{}')\n")
    assert run_once([str(script)], done)["commit"] == "one, then two"
    assert run_once([str(script)], done)["commit"] == "one, then two"  # not run again


def test_rows_that_are_added_later_have_a_commit_of_their_own(tmp_path, monkeypatch):
    minilm = pytest.importorskip("benchmarks.minilm", exc_type=ImportError)
    path = tmp_path / "minilm.json"
    path.write_text(json.dumps({"rows": {}, "latency": {}, "commit": None, "commit_unknown": "no git"}))

    def measure(rows, data, save) -> None:
        rows["0.5"] = {"share": 0.5, "cosine": 0.7, "commit": revision()["commit"]}
        save()

    monkeypatch.setattr(minilm, "RESULT", path)
    monkeypatch.setattr(minilm, "measure", measure)
    minilm.main([])
    result = json.loads(path.read_text())
    assert (result["commit"], "commit_unknown" in result) == (revision()["commit"], False)
    assert path.with_suffix(".md").read_text().splitlines()[:3] == [
        "| share | cosine |",
        "| --- | --- |",
        "| 0.5 | 0.7 |",
    ]
