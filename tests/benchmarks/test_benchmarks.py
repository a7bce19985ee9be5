"""The harness of the benchmarks: every theme runs, and its rows say what they should."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.harness.record import revision
from benchmarks.harness.tables import markdown_table, workload_tables
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Comparison, Goal, interleave
from benchmarks.themes import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_theme_runs_and_writes_its_results(name, tmp_path):
    main([name, "--tiny", "--out", str(tmp_path)])
    result = json.loads((tmp_path / f"{name}-cpu.json").read_text())
    assert result["complete"]
    assert result["command"] == f"python -m benchmarks {name} --device cpu --tiny"
    assert result["commit"] == revision()["commit"]
    assert result["rows"]
    for row in result["rows"]:
        assert {"workload", "case"} <= row.keys()
    assert result["command"] in (tmp_path / f"{name}-cpu.md").read_text()


def test_a_wrong_answer_is_not_timed(tmp_path):
    def wrong(options):
        raise RuntimeError("differs")

    options = Options("cpu", "tiny", "command", tmp_path)
    with pytest.raises(RuntimeError, match="differs"):
        Theme("stub", wrong, lambda options: []).run(options)
    assert list(tmp_path.iterdir()) == []


def test_results_are_there_before_a_theme_ends(tmp_path):
    def rows(options):
        yield {"workload": "w", "case": "first"}
        raise RuntimeError("the second breaks")

    options = Options("cpu", "tiny", "command", tmp_path)
    with pytest.raises(RuntimeError, match="breaks"):
        Theme("stub", lambda options: None, rows).run(options)
    result = json.loads((tmp_path / "stub-cpu.json").read_text())
    assert ([row["case"] for row in result["rows"]], result["complete"]) == (["first"], False)


def test_cases_take_turns_and_none_is_always_first():
    order = []
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(cases, "cpu", rounds=2, warmup=1)
    assert "".join(order) == "abcbcacab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_row_compares_within_rounds(monkeypatch):
    times = {"slow": [4.0, 8.0, 6.0], "fast": [2.0, 2.0, 2.0]}
    monkeypatch.setattr("benchmarks.harness.timing.interleave", lambda *args, **options: times)
    goals = {"fast": Goal("slow", faster=3)}
    slow, fast = Comparison("w", {"slow": int, "fast": int}, "slow", {"fast": 6.0}, goals).measure("cpu", rounds=3)
    assert (slow["speedup"], fast["speedup"], fast["share_of_limit"]) == (1, 3, 0.5)
    assert (fast["goal"], fast["reached"]) == ("3 times as fast as slow", True)
    assert Goal("slow", slower=0.2).reached(times, "fast") is False


def test_a_table_leaves_out_columns_without_values():
    rows = [{"a": 1, "b": None, "c": True}, {"a": 0.123456, "c": None}]
    assert markdown_table(rows).splitlines() == ["| a | c |", "| --- | --- |", "| 1 | yes |", "| 0.1235 |  |"]


def test_workloads_of_which_the_same_is_known_share_a_table():
    rows = [{"workload": "w", "a": 1}, {"workload": "v", "b": 2}, {"workload": "w", "a": 3}, {"workload": "u", "a": 4}]
    assert workload_tables(rows) == [markdown_table([rows[0], rows[2], rows[3]]), markdown_table([rows[1]])]
