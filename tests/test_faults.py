"""One trial of every fault, as ``python -m benchmarks.faults`` runs them by the dozen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("faults")

ROOT = Path(__file__).parents[1]
FAULTS = ("kill", "disk", "damage", "data")


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    options = [
        "--trials",
        str(len(FAULTS)),
        "--seed",
        "452",
        "--work",
        str(folder),
        "--out",
        str(folder / "faults.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", "--engines", "ddp", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {trial["fault"]: trial for trial in json.loads((folder / "faults.json").read_text())["trials"]}


@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_the_curve_is_that_of_an_undisturbed_run_and_no_checkpoint_is_lost(trials, fault):
    trial = trials[fault]
    if trial["outcome"].startswith("skipped"):
        pytest.skip(trial["outcome"])
    assert trial["outcome"] in ("resumed", "unharmed", "refused, naming the file"), trial
    # In the others a disk is full or the newest checkpoint damaged, and the next one is further back.
    if fault == "kill":
        assert trial["repeated_steps"] <= trial["save_steps"] * (1 + trial["async_save"])
