"""All themes on one GPU, in pieces: what is complete is skipped, and none begins that the time does not suffice for.

``benchmarks/gpu_suite.sh [--device cuda] [--budget SECONDS] [--out DIR] [--archive FILE] [THEME ...]``. A theme that
did not end within its time is run again ``--quick``, and then without its sweeps. At the end stands ``gpu_suite.md``:
what was run, and which goals were reached.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.record import write_result
from benchmarks.harness.tables import markdown_table
from benchmarks.harness.theme import RESULTS
from benchmarks.themes import NAMES
from hf_fnl.utils.files import write_text

logger = logging.getLogger("benchmarks")

# Seconds that a theme may take on a GPU, some 10 to load libraries among them; 530 in all. Those with most goals first.
SECONDS = {
    "bert_step": 130,
    "optimizer": 50,
    "init": 40,
    "layers": 45,
    "gpt2_step": 50,
    "memory": 35,
    "generate": 45,
    "marian": 35,
    "vision": 40,
    "loading": 25,
    "data": 20,
}
ATTEMPTS: tuple[tuple[str, bool], ...] = (("full", True), ("quick", True), ("quick", False))  # size, sweeps
OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Suite:
    """Where the suite writes, and how it runs.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        out: Folder of the results.
        tiny: Only see that it runs.
        until: When it has to be done, on :func:`time.monotonic`'s clock.
    """

    device: str
    out: Path
    tiny: bool
    until: float

    def result(self, name: str) -> dict[str, Any]:
        """What a theme wrote so far."""
        path = self.out / f"{name}-{self.device}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def record(self) -> dict[str, dict[str, Any]]:
        """How the runs of the themes ended, by theme."""
        path = self.out / "gpu_suite.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        themes: dict[str, dict[str, Any]] = found.get("themes", {})
        return themes

    def run(self, name: str) -> bool:
        """Run a theme unless it is complete or was given up; says whether there was time to."""
        record = self.record()
        tried = record.get(name, {}).get("tried", 0)
        if self.result(name).get("complete") or tried >= len(ATTEMPTS):
            return True
        left = self.until - time.monotonic()
        allowed = SECONDS[name] if self.device == "cuda" else left
        if left < SECONDS[name] / 2:
            return False
        size, sweeps = ("tiny", True) if self.tiny else ATTEMPTS[tried]
        logger.info("%s (%s) ...", name, size)
        started = time.monotonic()
        flags = [f"--{size}"] * (size != "full") + ["--no-sweeps"] * (not sweeps)
        ending = self._in_process(name, flags, min(left, allowed))
        suite_ended = ending == OUT_OF_TIME and left < allowed
        seconds = time.monotonic() - started
        record[name] = {"ended": ending, "seconds": seconds, "tried": tried + (not suite_ended)}
        write_result(self.out / "gpu_suite.json", {"themes": record})
        logger.info("%s: %s after %.0f s", name, ending, seconds)
        return True

    def _in_process(self, name: str, flags: Sequence[str], seconds: float) -> str:
        """Run a theme in a process of its own, which writes what it prints into a file."""
        log = self.out / f"{name}-{self.device}.log"
        with log.open("w", encoding="utf-8") as file:
            command = [*theme_command(name, self.device, self.out), *flags]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return OUT_OF_TIME
        finally:
            _end(process)
        return "complete" if code == 0 else f"failed, see {log.name}"

    def summarize(self) -> dict[str, Any]:
        """Write ``gpu_suite.md``: the themes, and the goals."""
        record, results = self.record(), {name: self.result(name) for name in SECONDS}
        themes = [
            {
                "theme": name,
                "complete": bool(result.get("complete")),
                "rows": len(result.get("rows", [])),
                "not measured": sum("not_measured" in row for row in result.get("rows", [])),
                "ended": record.get(name, {}).get("ended", "not run"),
                "seconds": record.get(name, {}).get("seconds"),
                "command": result.get("command"),
            }
            for name, result in results.items()
        ]
        columns = ("workload", "case", "milliseconds", "speedup", "limit", "share_of_limit", "goal", "reached")
        goals = [
            {"theme": name, **{column: row.get(column) for column in columns}}
            for name, result in results.items()
            for row in result.get("rows", [])
            if row.get("goal") is not None
        ]
        found = next((result["machine"] for result in results.values() if "machine" in result), {})
        parts = [", ".join(f"{key}: {value}" for key, value in found.items()), markdown_table(themes)]
        parts += [f"{sum(bool(row['reached']) for row in goals)} of {len(goals)} goals reached", markdown_table(goals)]
        write_text(self.out / "gpu_suite.md", "\n\n".join(part for part in parts if part) + "\n")
        return {"themes": themes, "goals": goals}


def theme_command(name: str, device: str, out: Path) -> list[str]:
    """What runs a theme."""
    return [sys.executable, "-m", "benchmarks", name, "--device", device, "--out", str(out)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, which are given the time to end theirs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def take_over(out: Path, device: str) -> None:
    """Begin with the complete results that are in the repository, if the results go elsewhere."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*NAMES, "gpu_suite"):
        for source in RESULTS.glob(f"{name}-{device}.*" if name != "gpu_suite" else "gpu_suite.json"):
            target = out / source.name
            if out.resolve() != RESULTS.resolve() and not target.exists():
                shutil.copyfile(source, target)


def pack(out: Path, device: str, archive: Path) -> None:
    """Put all results into one file."""
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted([*out.glob(f"*-{device}.*"), *out.glob("gpu_suite.*")]):
            if path.resolve() != archive.resolve():
                packed.add(path, path.name)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, run; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("themes", nargs="*", metavar="THEME", default=None, help=", ".join(SECONDS))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=540, help="seconds after which nothing runs any more")
    parser.add_argument("--tiny", action="store_true", help="only to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--archive", type=Path, help="file, .tar.gz, that takes all results at the end")
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.themes) - set(SECONDS)):
        parser.error(f"unknown theme {unknown[0]!r}; there are {', '.join(SECONDS)}")
    if given.tiny and given.out.resolve() == RESULTS.resolve():
        parser.error("--tiny measures nothing: give it another --out than the folder of the results")
    suite = Suite(given.device, given.out, given.tiny, time.monotonic() + given.budget)
    take_over(given.out, given.device) if not given.tiny else given.out.mkdir(parents=True, exist_ok=True)
    left = [name for name in given.themes or SECONDS if not suite.run(name)]
    summary = suite.summarize()
    if given.archive is not None:
        pack(given.out, given.device, given.archive)
    logger.info("%s", f"no time for {', '.join(left)}: run it again" if left else "all themes were run")
    return summary


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
