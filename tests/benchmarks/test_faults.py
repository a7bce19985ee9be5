"""A kill, a full disk and a damaged file, of the trials that ``python -m benchmarks.faults`` runs by the dozen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_after_every_fault_the_curve_is_that_of_an_undisturbed_run_and_no_checkpoint_is_lost(tmp_path):
    options = ["--trials", "3", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "faults.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.faults", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trials = json.loads((tmp_path / "faults.json").read_text())["trials"]
    assert len({trial["fault"] for trial in trials}) == 3
    for trial in trials:
        if not trial["outcome"].startswith("skipped"):
            assert (trial["outcome"], trial["bitwise"]) == ("right", True), trial
