"""Grids of trainings: what is done is skipped, what was broken off goes on, and tables compare runs in pairs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from benchmarks import grid, grid_runs, mps
from benchmarks.grid_tables import NOT_DECIDED, NOT_SEEN, SEEN, paired_difference

# A training of which the options say how it ends; it counts how often it was begun.
PROGRAM = """
import argparse, json, pathlib, signal, sys, time
if sys.argv[1] == "--several":
    import subprocess
    codes = [subprocess.call([sys.executable, __file__, *words]) for words in json.load(open(sys.argv[2]))]
    sys.exit(max(codes))
parser = argparse.ArgumentParser()
for name, kind in {"seed": int, "out": pathlib.Path, "device": str, "data": str, "deadline": float}.items():
    parser.add_argument(f"--{name}", type=kind)
parser.add_argument("--value", type=float, default=0.0)
parser.add_argument("--seconds", type=float, default=0.0)
parser.add_argument("--fail", action="store_true")
parser.add_argument("--needs", type=pathlib.Path)
args = parser.parse_args()
begun = args.out / "begun"
begun.write_text(begun.read_text() + "x" if begun.exists() else "x")
if args.fail:
    sys.exit("it went wrong")
checkpoint = args.out / "checkpoint.pt"
def stop(*_):
    checkpoint.write_text("half")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
if not checkpoint.exists():
    time.sleep(args.seconds)
value = args.value + args.seed
if args.needs:
    value += json.loads((args.needs / "result.json").read_text())["measures"]["value"]
measures = {"value": value, "resumed": float(checkpoint.exists())}
(args.out / "result.json").write_text(json.dumps({"measures": measures}))
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Writes a plan whose program is the one above, and returns its path."""
    (tmp_path / "training_of_a_test.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def write(name="plan", **fields):
        found = {"title": "A test", "program": "training_of_a_test", "seeds": [0], "measures": ["value"], **fields}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(found, sort_keys=False))
        return str(path)

    return write


def run(plan, out, *words):
    return grid.main([plan, "--out", str(out), *words])


def record(out, name):
    return json.loads((out / "plan" / name / "run.json").read_text())


def test_done_runs_are_skipped_and_failed_ones_tried_again(plan, tmp_path):
    path = plan(cells={"good": {"value": 1}, "bad": {"fail": True}}, seeds=[0, 1])
    for attempt in (1, 2):
        table = run(path, tmp_path / "out")["plan"]
        assert (table["done"], table["runs"]) == (2, 4)
        assert (tmp_path / "out/plan/good-s1/begun").read_text() == "x"
        assert (tmp_path / "out/plan/bad-s1/begun").read_text() == "x" * attempt
    assert record(tmp_path / "out", "bad-s0")["failed"][-1] == "it went wrong"
    assert table["cells"]["good"]["value"] == {"n": 2, "mean": 1.5, "std": pytest.approx(0.5**0.5)}
    assert table["cells"]["bad"]["value"]["n"] == 0


def test_a_run_waits_for_the_one_whose_folder_it_is_given(plan, tmp_path):
    cells = {"late": {"value": 1, "needs": "run:early"}, "early": {"value": 10}, "never": {"needs": "run:bad"}}
    path = plan(cells={**cells, "bad": {"fail": True}}, seeds=[0, 1])
    table = run(path, tmp_path / "out", "--workers", "2")["plan"]
    assert table["values"]["late"]["value"] == {"0": 11.0, "1": 13.0}
    assert not (tmp_path / "out/plan/never-s0").exists()


def test_runs_share_a_process_where_a_plan_says_so(plan, tmp_path):
    cells = {"a": {"value": 1}, "bad": {"fail": True}, "b": {"value": 5, "needs": "run:a"}}
    path = plan(cells=cells, seeds=[0, 1], together=3)
    table = run(path, tmp_path / "out", "--together", "3")["plan"]
    assert table["values"]["b"]["value"] == {"0": 6.0, "1": 8.0}
    assert (tmp_path / "out/plan/log.txt").read_text().count("--several") == 2
    sizes = {name: record(tmp_path / "out", name)["together"] for name in ("a-s0", "bad-s0", "a-s1", "b-s0", "bad-s1")}
    assert sizes == {"a-s0": 3, "bad-s0": 3, "a-s1": 3, "b-s0": 3, "bad-s1": 3}
    assert "it went wrong" in record(tmp_path / "out", "bad-s1")["failed"]


def test_runs_that_all_fail_in_one_process_are_tried_in_several(plan, tmp_path):
    path = plan(cells={"a": {"fail": True}, "b": {"fail": True}})
    assert run(path, tmp_path / "out", "--together", "2")["plan"]["done"] == 0
    assert record(tmp_path / "out", "a-s0")["attempts"] == record(tmp_path / "out", "b-s0")["attempts"] == 2
    assert record(tmp_path / "out", "b-s0")["together"] == 1


def test_later_cells_begin_after_all_seeds_of_the_others(plan, tmp_path):
    found = grid.read_plan(plan(cells={"a": {}, "b": {}, "c": {}}, later=["a"], seeds=[0, 1]))
    order = [(each.cell, each.seed) for each in grid.runs_of([found], tmp_path)]
    assert order == [("b", 0), ("c", 0), ("b", 1), ("c", 1), ("a", 0), ("a", 1)]


def test_at_the_deadline_a_run_writes_a_checkpoint_from_which_the_next_call_goes_on(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "SHORTEST", 0.0)
    monkeypatch.setattr(grid, "TABLES", 0.5)
    monkeypatch.setattr(grid, "GRACE", 3.0)
    path = plan(cells={"slow": {"seconds": 60}, "next": {}}, measures=["value", "resumed"])
    began = time.time()
    assert run(path, tmp_path / "out", "--minutes", "0.07")["plan"]["done"] == 0
    assert time.time() - began < 6
    assert record(tmp_path / "out", "slow-s0")["failed"] is None
    assert not (tmp_path / "out/plan/next-s0").exists()
    table = run(path, tmp_path / "out")["plan"]
    assert table["values"]["slow"]["resumed"] == {"0": 1.0}
    assert record(tmp_path / "out", "slow-s0")["attempts"] == 2


def test_nothing_begins_that_has_no_time(plan, tmp_path, monkeypatch):
    path = plan(cells={"only": {}}, seeds=[0])
    run(path, tmp_path / "out")
    state = tmp_path / "out/plan/only-s0/run.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "seconds": 3600}))
    path = plan(cells={"only": {}}, seeds=[0, 1])
    assert run(path, tmp_path / "out", "--minutes", "1")["plan"]["done"] == 1
    assert not (tmp_path / "out/plan/only-s1").exists()
    assert run(path, tmp_path / "out")["plan"]["done"] == 2


def test_status_says_what_is_left_and_in_how_many_hours(plan, tmp_path, capsys):
    path = plan(cells={"a": {}, "b": {"fail": True}}, seeds=[0])
    run(path, tmp_path / "out")
    state = tmp_path / "out/plan/a-s0/run.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "seconds": 1800}))
    capsys.readouterr()
    run(path, tmp_path / "out", "--status")
    assert capsys.readouterr().out == "plan: 1 done, 1 failed of 2; 0.50 hours left\n"


def test_options_that_changed_are_refused(plan, tmp_path):
    run(plan(cells={"a": {"value": 1}}), tmp_path / "out")
    with pytest.raises(ValueError, match="take another --out"):
        run(plan(cells={"a": {"value": 2}}), tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"cells": {"a": {}}, "seed": [1]}, "no field 'seed'", id="field"),
        pytest.param({"cells": {"a": {"needs": "run:b"}}}, "a names no cell 'b'", id="run"),
        pytest.param({"cells": {"a": {}}, "pairs": [["a", "b", "value", "+"]]}, "pairs names no cell 'b'", id="pair"),
    ],
)
def test_a_plan_that_is_wrong_is_refused(plan, fields, message):
    with pytest.raises(ValueError, match=message):
        grid.read_plan(plan(**fields))


def test_the_archive_holds_results_tables_and_logs_but_no_checkpoints(plan, tmp_path):
    path = plan(cells={"a": {}})
    (tmp_path / "out/plan/a-s0").mkdir(parents=True)
    (tmp_path / "out/plan/a-s0/checkpoint.pt").write_text("large")
    run(path, tmp_path / "out", "--archive", str(tmp_path / "all.tar.gz"))
    listed = subprocess.run(["tar", "tzf", tmp_path / "all.tar.gz"], capture_output=True, text=True, check=True)
    names = {Path(name).name for name in listed.stdout.split()}
    assert names == {"result.json", "run.json", "log.txt", "table.json", "table.md"}


def test_some_cells_and_seeds_with_changed_options(plan, tmp_path):
    path = plan(cells={"a-x": {}, "a-y": {"needs": "run:a-x"}, "b": {}}, seeds=[0, 1, 2], options={"value": 1})
    words = ["--cells", "a-*", "--seeds", "0", "2", "--set", "value=10"]
    table = run(path, tmp_path / "out", *words)["plan-value=10"]
    assert table["title"] == "A test, with value=10"
    values = {cell: table["values"][cell]["value"] for cell in table["values"]}
    assert values == {"a-x": {"0": 10.0, "2": 12.0}, "a-y": {"0": 20.0, "2": 24.0}, "b": {}}
    with pytest.raises(ValueError, match="no run of"):
        run(path, tmp_path / "out", "--cells", "c")


@pytest.mark.parametrize("probe", ["pass", "raise SystemExit('no device')"], ids=["works", "does-not"])
def test_the_multi_process_service_is_used_if_a_process_computes_under_it(probe, tmp_path, monkeypatch):
    control = tmp_path / mps.CONTROL
    control.write_text(
        f'#!/bin/sh\ntest -d "$CUDA_MPS_PIPE_DIRECTORY" && echo "$1$(test "$1" || cat)" >> {tmp_path}/said\n'
    )
    control.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(mps, "PROBE", probe)
    service = mps.MultiProcessService.start()
    assert (service is not None) == (probe == "pass")
    if service is not None:
        assert "CUDA_MPS_LOG_DIRECTORY" in service.environment
        service.stop()
        assert service.environment == {}
        service.stop()
    assert (tmp_path / "said").read_text().split() == ["-d", "quit"]


def test_without_the_multi_process_service_there_is_none(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert mps.MultiProcessService.start() is None


def test_the_runner_imports_no_torch():
    code = "import benchmarks.grid, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=grid_runs.ROOT).returncode == 0


@pytest.mark.parametrize(
    ("differences", "expected", "t", "verdict"),
    [
        # mean 2, std 1, t = 2 sqrt(3) = 3.464 < 4.303; mean 3, std 1, t = 5.196 > 4.303
        pytest.param([1.0, 2.0, 3.0], "+", 3.4641016, NOT_DECIDED, id="below-the-critical-value"),
        pytest.param([2.0, 3.0, 4.0], "+", 5.1961524, SEEN, id="above-it"),
        pytest.param([2.0, 3.0, 4.0], "-", 5.1961524, NOT_SEEN, id="above-it-with-the-other-sign"),
        # mean 0.1, std 0.1, half-width 4.303 * 0.1 / sqrt(3) = 0.248: between -0.148 and 0.348
        pytest.param([0.0, 0.1, 0.2], "=0.4", 1.7320508, SEEN, id="within-the-margin"),
        pytest.param([0.0, 0.1, 0.2], "=0.3", 1.7320508, NOT_DECIDED, id="perhaps-beyond-the-margin"),
        pytest.param([2.0, 3.0, 4.0], "=0.3", 5.1961524, NOT_SEEN, id="beyond-the-margin"),
        pytest.param([5.0], "+", None, NOT_DECIDED, id="one-seed"),
        pytest.param([], "+", None, NOT_DECIDED, id="none"),
    ],
)
def test_paired_differences(differences, expected, t, verdict):
    found = paired_difference(differences, expected)
    assert found["verdict"] == verdict
    assert found["n"] == len(differences)
    assert found["t"] is None if t is None else found["t"] == pytest.approx(t)


def test_an_unknown_expectation_is_refused():
    with pytest.raises(ValueError, match=r"such as =0\.5"):
        paired_difference([1.0], "=0")


def test_pairs_compare_the_seeds_that_both_have(plan, tmp_path):
    path = plan(cells={"a": {"value": 3}, "b": {"value": 1}}, seeds=[0, 1, 2], pairs=[["a", "b", "value", "+"]])
    (tmp_path / "out/plan/b-s1").mkdir(parents=True)
    (tmp_path / "out/plan/b-s1/result.json").write_text(json.dumps({"measures": {"value": float("nan")}}))
    (pair,) = run(path, tmp_path / "out")["plan"]["pairs"]
    assert (pair["n"], pair["mean"], pair["std"], pair["verdict"]) == (2, 2.0, 0.0, SEEN)
    assert "| a - b | value | + | 2 | 2 |" in (tmp_path / "out/plan/table.md").read_text()
