"""The package of an earlier revision timed beside this one: has something become slower?"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.record import revision, write_result
from benchmarks.harness.tables import write_table
from benchmarks.harness.theme import Options

ROOT = Path(__file__).parents[2]
TURNS = 4  # even, so that each goes first as often as the other


def compare_with(ref: str, name: str, options: Options) -> dict[str, Any]:
    """Run a theme of this revision with the package of ``ref`` and with this one's, in turns.

    Args:
        ref: A revision that git knows.
        name: Of the theme.
        options: Of the theme; sweeps are left out.

    Returns:
        What is written into ``<theme>-<device>-against.json``: for every row its time here by its time there.

    Raises:
        RuntimeError: If git does not know ``ref``, or the theme does not run with one of the packages, for example
            because it uses what that did not have yet.
    """
    started = revision()
    with tempfile.TemporaryDirectory() as folder:
        before = _overlay(ref, Path(folder) / "tree")
        runs: dict[str, list[list[dict[str, Any]]]] = {"before": [], "now": []}
        for turn in range(TURNS):
            trees = [("before", before), ("now", ROOT)]
            for key, tree in trees if turn % 2 == 0 else reversed(trees):
                runs[key].append(_rows(tree, name, options, Path(folder) / f"{key}-{turn}"))
    command = shlex.join([*shlex.split(options.command), "--against", ref])
    result = {"command": command, **started, "rows": _joined(runs["before"], runs["now"])}
    path = options.out / f"{name}-{options.device}-against.json"
    write_result(path, result)
    write_table(path, result["rows"], command)
    return result


def _overlay(ref: str, tree: Path) -> Path:
    """A folder with the package of ``ref`` and the benchmarks of now."""
    archive = subprocess.run(["git", "archive", ref, "hf_fnl"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise RuntimeError(f"git archive {ref}: {archive.stderr.decode().strip()}")
    tree.mkdir()
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as packed:
        packed.extractall(tree, filter="data")
    for shared in ("benchmarks", "tests", "run_scripts"):
        (tree / shared).symlink_to(ROOT / shared)
    return tree


def _rows(tree: Path, name: str, options: Options, out: Path) -> list[dict[str, Any]]:
    size = [] if options.size == "full" else [f"--{options.size}"]
    command = [sys.executable, "-m", "benchmarks", name, "--device", options.device, *size, "--no-sweeps"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([*command, "--out", str(out)], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed with the package in {tree.name}:\n{done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads((out / f"{name}-{options.device}.json").read_text())["rows"]
    return rows


def _joined(before: list[list[dict[str, Any]]], now: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the turns, and their ratio, for rows that both have."""
    times = [_times(rows) for rows in before], [_times(rows) for rows in now]
    keys = [key for key in times[1][0] if all(key in found for side in times for found in side)]
    medians = {key: [median(found[key] for found in side) for side in times] for key in keys}
    return [
        {
            "workload": workload,
            "case": case,
            "milliseconds_before": old,
            "milliseconds_now": new,
            "now_by_before": new / old,
        }
        for (workload, case), (old, new) in medians.items()
    ]


def _times(rows: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    return {(row["workload"], row["case"]): row["milliseconds"] for row in rows if "milliseconds" in row}
