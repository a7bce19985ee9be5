"""The benchmark house: every theme runs, results join as they should, and the suite goes on where its time ended."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

import benchmarks.gpu.suite as gpu_suite
import benchmarks.harness.against as against
from benchmarks import time_to_loss
from benchmarks.__main__ import main
from benchmarks.harness.record import revision
from benchmarks.harness.sweeps import Sweep, growth
from benchmarks.harness.tables import markdown_table, workload_tables
from benchmarks.harness.theme import Options, Theme, render
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
    assert result["sweeps"]
    for sweep in result["sweeps"]:
        assert all(len(points) >= 3 for points in sweep["lines"].values()), sweep["title"]
    assert result["command"] in (tmp_path / f"{name}-cpu.md").read_text()
    assert (tmp_path / f"{name}-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_answer_is_not_timed(tmp_path):
    def wrong(options):
        raise RuntimeError("differs")

    options = Options("cpu", "tiny", "command", tmp_path)
    with pytest.raises(RuntimeError, match="differs"):
        Theme("stub", wrong, lambda options: [], lambda options: []).run(options)
    assert list(tmp_path.iterdir()) == []


def test_results_are_there_before_a_theme_ends(tmp_path):
    def rows(options):
        yield {"workload": "w", "case": "first"}
        raise RuntimeError("the second breaks")

    options = Options("cpu", "tiny", "command", tmp_path)
    with pytest.raises(RuntimeError, match="breaks"):
        Theme("stub", lambda options: None, rows, lambda options: []).run(options)
    result = json.loads((tmp_path / "stub-cpu.json").read_text())
    assert ([row["case"] for row in result["rows"]], result["complete"]) == (["first"], False)


def test_where_matplotlib_is_missing_there_is_no_plot(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sweep = Sweep("title", "width", "ms", {"ours": [(1, 1), (2, 4), (4, 16)]}, {}).record()
    (tmp_path / "stub-cpu.json").write_text(json.dumps({"rows": [], "sweeps": [sweep], "command": "c"}))
    render(tmp_path / "stub-cpu.json")
    assert {path.name for path in tmp_path.iterdir()} == {"stub-cpu.json", "stub-cpu.md"}
    assert "ours: 2.00" in (tmp_path / "stub-cpu.md").read_text()


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


@pytest.mark.parametrize(
    ("points", "power"),
    [
        pytest.param([(1, 100), (2, 8), (4, 64)], 3, id="the-larger-half"),
        pytest.param([(2, 3), (4, 6)], 1, id="two"),
        pytest.param([(2, 0), (4, 6)], None, id="nothing"),
    ],
)
def test_growth_is_a_power(points, power):
    assert growth(points) == (None if power is None else pytest.approx(power))


def test_a_table_leaves_out_columns_without_values():
    rows = [{"a": 1, "b": None, "c": True}, {"a": 0.123456, "c": None}]
    assert markdown_table(rows).splitlines() == ["| a | c |", "| --- | --- |", "| 1 | yes |", "| 0.1235 |  |"]


def test_a_loss_is_reached_where_the_curve_first_crosses_it():
    curve = [(100, 8.0), (200, 6.0), (300, 7.0), (400, 4.0)]
    assert [time_to_loss.first_below(curve, loss) for loss in (9, 7.5, 6, 5, 3)] == [100, 125, 200, 300 + 200 / 3, None]


def test_workloads_of_which_the_same_is_known_share_a_table():
    rows = [{"workload": "w", "a": 1}, {"workload": "v", "b": 2}, {"workload": "w", "a": 3}, {"workload": "u", "a": 4}]
    assert workload_tables(rows) == [markdown_table([rows[0], rows[2], rows[3]]), markdown_table([rows[1]])]


def test_two_revisions_are_joined_by_their_rows(tmp_path, monkeypatch):
    def rows(tree: Path, name: str, options: Options, out: Path) -> list[dict]:
        times = {"same": 2.0, "changed": 6.0 if tree == against.ROOT else 4.0}
        only = "new" if tree == against.ROOT else "old"
        timed = [{"workload": "w", "case": case, "milliseconds": time} for case, time in times.items()]
        return [*timed, {"workload": "w", "case": only, "milliseconds": 1.0}, {"workload": "w", "case": "x"}]

    monkeypatch.setattr(against, "_overlay", lambda ref, tree: tree)
    monkeypatch.setattr(against, "_rows", rows)
    options = Options("cpu", "tiny", "python -m benchmarks stub --device cpu --tiny", tmp_path)
    found = against.compare_with("HEAD", "stub", options)
    assert [(row["case"], row["now_by_before"]) for row in found["rows"]] == [("same", 1), ("changed", 1.5)]
    assert found["command"] == "python -m benchmarks stub --device cpu --tiny --against HEAD"
    assert json.loads((tmp_path / "stub-cpu-against.json").read_text()) == found


def test_the_package_of_a_revision_lies_beside_the_benchmarks_of_now(tmp_path):
    if not (against.ROOT / ".git").exists():
        pytest.skip("no repository")
    tree = against._overlay("HEAD", tmp_path / "tree")
    assert (tree / "hf_fnl" / "__init__.py").is_file()
    assert (tree / "benchmarks").resolve() == against.ROOT / "benchmarks"
    with pytest.raises(RuntimeError, match="git archive nowhere"):
        against._overlay("nowhere", tmp_path / "other")


STUB = """
import json, sys, time
from pathlib import Path
name, out, flags = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
if name == "breaks":
    raise SystemExit("no")
if name == "sleeps" and "--no-sweeps" not in flags:
    time.sleep(60)
row = {"workload": "w", "case": name, "goal": "2 times as fast as x", "reached": name == "runs", "flags": flags}
result = {"rows": [row], "complete": True, "command": "c", "machine": {"device": "d"}}
(out / f"{name}-cuda.json").write_text(json.dumps(result))
"""


@pytest.fixture
def stubs(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_suite, "SECONDS", {"runs": 4, "breaks": 4, "sleeps": 1})
    monkeypatch.setattr(
        gpu_suite, "theme_command", lambda name, device, out: [sys.executable, "-c", STUB, name, str(out)]
    )
    return tmp_path / "out"


def test_the_suite_begins_nothing_that_it_has_no_time_for(stubs):
    summary = gpu_suite.main(["--out", str(stubs), "--budget", "0"])
    assert [row["ended"] for row in summary["themes"]] == ["not run"] * 3


def test_the_suite_goes_on_and_takes_less_of_what_did_not_end(stubs, tmp_path):
    archive = tmp_path / "all.tar.gz"
    ended = []
    for _ in range(4):
        summary = gpu_suite.main(["--out", str(stubs), "--budget", "60", "--archive", str(archive)])
        ended.append([row["ended"] for row in summary["themes"]])
    failed = "failed, see breaks-cuda.log"
    slept = ["complete", failed, "out of time"]
    assert ended == [slept, slept, ["complete", failed, "complete"], ["complete", failed, "complete"]]
    record = json.loads((stubs / "gpu_suite.json").read_text())["themes"]
    assert {name: entry["tried"] for name, entry in record.items()} == {"runs": 1, "breaks": 3, "sleeps": 3}
    assert json.loads((stubs / "sleeps-cuda.json").read_text())["rows"][0]["flags"] == ["--quick", "--no-sweeps"]
    assert [(row["theme"], row["reached"]) for row in summary["goals"]] == [("runs", True), ("sleeps", False)]
    assert "1 of 2 goals reached" in (stubs / "gpu_suite.md").read_text()
    with tarfile.open(archive) as packed:
        assert {"gpu_suite.md", "runs-cuda.json", "breaks-cuda.log"} <= set(packed.getnames())


def test_a_dry_run_does_not_overwrite_results(capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--device", "cpu", "--tiny"])
    assert "give it another --out" in capsys.readouterr().err


def test_the_suite_has_a_time_for_every_theme_and_nine_minutes_in_all():
    assert set(gpu_suite.SECONDS) == set(NAMES)
    assert sum(gpu_suite.SECONDS.values()) < 9 * 60
