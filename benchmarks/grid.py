"""Grids of trainings: each run is a process of its own, what is done is skipped, and what was broken off goes on.

    python -m benchmarks.grid PLAN... [--minutes N] [--out DIR] [--workers N] [--device cpu] [--tiny] [--status]
                              [--cells GLOB...] [--seeds N...] [--set NAME=VALUE...] [--archive FILE]

:mod:`benchmarks.grid_runs` says what a plan is.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import logging
import math
import os
import signal
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.grid_runs import (
    BROKEN,
    COMMIT,
    DONE,
    FAILED,
    LEFT,
    LOG,
    RESULT,
    RUNNING,
    STATE,
    Plan,
    Run,
    commit,
    expected_seconds,
    read_plan,
    read_result,
    runs_of,
    start,
)
from benchmarks.grid_tables import write_tables
from benchmarks.mps import MultiProcessService

logger = logging.getLogger("benchmarks.grid")

WORKERS = {"cpu": 1, "cuda": 12}
WITHOUT_MPS = 4  # processes that share a GPU take turns then
SHORTEST = 20.0  # seconds that a run of unknown length needs to be begun
TABLES = 4.0  # seconds for tables and the archive after all runs have ended
GRACE = 8.0  # seconds between SIGTERM and SIGKILL


@dataclass(kw_only=True)
class Grid:
    """Runs, and how they are run.

    Args:
        runs: All of them, the most important first.
        device: ``"cpu"`` or ``"cuda"``.
        data: Folder of the data sets.
        workers: Processes at once.
        until: When everything has to be over, in seconds since the epoch; ``None`` for no limit.
        environment: Of the processes.
        service: Lets processes share the GPU.
        together: How many runs of a plan, by its name, one process trains; one unless given.
    """

    runs: Sequence[Run]
    device: str
    data: Path
    workers: int
    until: float | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    service: MultiProcessService | None = None
    together: dict[str, int] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)

    def train(self) -> None:
        """Run what is not done, until all is or the time is over."""
        stop_at = None if self.until is None else self.until - GRACE - TABLES
        while True:
            self._collect()
            if stop_at is not None and time.time() >= stop_at:
                break
            while runs := self._next(stop_at):
                for run in runs:
                    logger.info("%s begins%s", run.name, " in one process with others" if len(runs) > 1 else "")
                    self.tried.add(run.name)
                environment = {**self.environment, **(self.service.environment if self.service else {})}
                start(runs, self.device, self.data, stop_at, environment)
            if not self.running:
                break
            time.sleep(0.2)
        self.stop()

    @property
    def running(self) -> list[Run]:
        """Runs whose processes have not ended."""
        return [run for run in self.runs if run.process is not None]

    def stop(self) -> None:
        """End all processes, after some seconds in which they may write a checkpoint."""
        for run in self.running:
            run.stop(signal.SIGTERM)
        limit = time.time() + GRACE
        while self.running and time.time() < limit:
            self._collect()
            time.sleep(0.05)
        for run in self.running:
            run.stop(signal.SIGKILL)
            if run.process is not None:
                run.process.wait()
        self._collect()

    def _next(self, stop_at: float | None) -> list[Run]:
        """The first run that may begin now, with those that may share its process; none if there is none.

        Less important runs do not keep one from its place.
        """
        free = self.workers - sum(self._slots(run) for run in self.running)
        left = math.inf if stop_at is None else stop_at - time.time()
        first = None
        sharing: list[Run] = []
        for run in self.runs:
            if run.name in self.tried or run.state in (DONE, RUNNING) or run.waits:
                continue
            if (expected_seconds(run, self.runs) or SHORTEST) > left:
                continue
            if first is None:
                if self._slots(run) > free:
                    return []
                first = run
            if run.plan is first.plan and len(sharing) < self._together(first.plan):
                sharing.append(run)
        while len(sharing) > 1 and (expected_seconds(sharing[-1], self.runs, len(sharing)) or 0) > left:
            sharing.pop()
        return sharing

    def _together(self, plan: Plan) -> int:
        """How many runs of a plan one process trains."""
        return self.together.get(plan.name, 1)

    def _slots(self, run: Run) -> int:
        """How many of the workers a run takes: all, if it shares a process with others."""
        return self.workers if self._together(run.plan) > 1 else min(run.plan.slots, self.workers)

    def _collect(self) -> None:
        """See which runs have ended."""
        for run in self.running:
            if run.poll():
                logger.info("%s: %s after %.0f s", run.name, run.state, run.record()["seconds"])
                for line in run.record().get("failed") or ():
                    logger.info("    %s", line)
        self._try_otherwise()

    def _try_otherwise(self) -> None:
        """Try again with a process for each run, and without the service, if all runs so far have failed."""
        ended = [run for run in self.runs if run.name in self.tried and run.process is None]
        if self.running or len(ended) < 2 or any(run.state != FAILED for run in ended):
            return
        if self.device != "cpu" and self.service is not None and self.service.active:
            logger.info("all runs failed under MPS; they are tried again without it")
            self.service.stop()
            self.workers = min(self.workers, WITHOUT_MPS)
            self.tried.clear()
        elif any(run.others for run in ended):
            logger.info("all runs failed in one process; they are tried again in several")
            self.together = {}
            self.workers = min(self.workers, WITHOUT_MPS)
            for run in ended:
                run.others = 0
            self.tried.clear()


def status(plans: Sequence[Plan], runs: Sequence[Run], at_once: Mapping[str, int]) -> str:
    """Return, for each plan, how many runs are in which state, and for how many hours there is work.

    Args:
        plans: Which.
        runs: Of all plans.
        at_once: How many runs of a plan, by its name, are trained at once.
    """
    lines = []
    for plan in plans:
        mine = [run for run in runs if run.plan is plan]
        states = [run.state for run in mine]
        counts = ", ".join(f"{states.count(s)} {s}" for s in (DONE, RUNNING, BROKEN, FAILED, LEFT) if s in states)
        seconds = [expected_seconds(run, mine, at_once[plan.name]) for run in mine if run.state != DONE]
        known = [value for value in seconds if value is not None]
        hours = f"{sum(known) / 3600 / at_once[plan.name]:.2f} hours left" if known else "time unknown"
        lines.append(f"{plan.name}: {counts} of {len(mine)}; {hours if seconds else 'complete'}")
    return "\n".join(lines)


def write_archive(path: Path, out: Path, plans: Sequence[Plan]) -> None:
    """Pack results, tables, records and logs, without checkpoints."""
    with tarfile.open(path, "w:gz") as archive:
        for plan in plans:
            files = [*(out / plan.name).glob("*.*"), *(out / plan.name).glob(f"*/{RESULT}")]
            files += [*(out / plan.name).glob(f"*/{STATE}"), *(out / plan.name).glob(f"*/{LOG}")]
            for file in sorted(files):
                archive.add(file, file.relative_to(out))
    logger.info("%s: %.1f MB", path, path.stat().st_size / 1e6)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run plans, and return their tables."""
    began = time.time()
    args = _arguments(argv)
    plans = [read_plan(name, args.set) for name in dict.fromkeys(args.plan)]
    out = args.out.resolve()
    runs = [
        run
        for run in runs_of(plans, out, tiny=args.tiny)
        if any(fnmatch.fnmatch(run.cell, cells) for cells in args.cells)
        if args.seeds is None or run.seed in args.seeds
    ]
    if not runs:
        raise ValueError(f"no run of {', '.join(args.plan)} has --cells {args.cells} and --seeds {args.seeds}")
    for run in runs:
        run.check()
    workers = WORKERS[args.device] if args.workers is None else args.workers
    together = {plan.name: args.together or (plan.together if args.device == "cuda" else 1) for plan in plans}
    at_once = {
        plan.name: together[plan.name] if together[plan.name] > 1 else max(1, workers // plan.slots) for plan in plans
    }
    if args.status:
        print(status(plans, runs, at_once))
        return {}
    service = None
    if args.device == "cuda" and workers > 1 and 1 in together.values():
        service = MultiProcessService.start()
        if service is None and args.workers is None:
            workers = WITHOUT_MPS
    grid = Grid(
        runs=runs,
        device=args.device,
        data=args.data.resolve(),
        workers=workers,
        until=None if args.minutes is None else began + 60 * args.minutes,
        environment={
            "OMP_NUM_THREADS": "1",
            "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # streams of one process that a GPU computes at once
            **os.environ,
            COMMIT: commit(),
        },
        service=service,
        together=together,
    )
    try:
        with _ends_on_signals():
            grid.train()
    except KeyboardInterrupt:
        logger.info("told to end")
    finally:
        grid.stop()
        if service is not None:
            service.stop()
        tables = {plan.name: write_tables(out / plan.name, plan, _results(plan, runs)) for plan in plans}
        logger.info("%s", status(plans, runs, at_once))
        if args.archive is not None:
            write_archive(args.archive, out, plans)
    return tables


def _results(plan: Plan, runs: Sequence[Run]) -> dict[str, dict[int, dict[str, Any]]]:
    """The results of a plan by cell and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {cell: {} for cell in plan.cells}
    for run in runs:
        if run.plan is plan and (result := read_result(run.folder)) is not None:
            found[run.cell][run.seed] = result
    return found


@contextlib.contextmanager
def _ends_on_signals() -> Iterator[None]:
    """Let SIGTERM be what an interruption by the keyboard is."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="+", help="names in benchmarks/plans, the most important first")
    parser.add_argument("--minutes", type=float, help="end within this time, tables included")
    parser.add_argument("--out", type=Path, default=Path("runs/grids"), help="folder of all runs")
    parser.add_argument("--workers", type=int, help="processes at once (cpu: 1, cuda: 12)")
    parser.add_argument("--together", type=int, help="runs in one process (cpu: 1, cuda: what the plan says)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--tiny", action="store_true", help="only see that each run works")
    parser.add_argument("--status", action="store_true", help="say what is done and what is left, and run nothing")
    parser.add_argument("--cells", nargs="+", default=["*"], help="only cells whose names match one of these patterns")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--set", nargs="+", default=[], help="options NAME=VALUE in the place of the plans'")
    parser.add_argument("--archive", type=Path, help="pack results, tables and logs into this .tar.gz at the end")
    args = parser.parse_args(argv)
    if wrong := [entry for entry in args.set if "=" not in entry]:
        parser.error(f"--set takes NAME=VALUE, got {wrong[0]}")
    args.set = {name: yaml.safe_load(value) for name, _, value in (entry.partition("=") for entry in args.set)}
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.minutes is not None and args.minutes * 60 <= GRACE + TABLES:
        parser.error(f"--minutes must be more than {(GRACE + TABLES) / 60:.2f}, got {args.minutes}")
    return args


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
