"""Grids of trainings: each run is a process of its own, what is done is skipped, and what was broken off goes on.

    python -m benchmarks.grid PLAN... [--minutes N] [--out DIR] [--workers N] [--device cpu] [--tiny] [--status]
                              [--cells GLOB...] [--seeds N...] [--set NAME=VALUE...] [--archive FILE]

A plan is ``benchmarks/plans/PLAN.yaml``::

    title, paper, expect    what it is, what the paper reports, and what would count as seeing it
    program                 the module that trains, such as benchmarks.training.vision
    options                 of all runs; {name: value} becomes --name value, true --name, false and null nothing
    tiny                    options that replace others under --tiny, which only shows that the plan runs
    cells                   {name: {options}}; the value "run:CELL" is the folder of that cell's run with the same seed,
                            and the run waits until that one is done
    seeds                   [0, 1, ...]; all cells of the first seed come before any of the second
    measures                names of numbers in result.json that are tabulated
    pairs                   [cell, other cell, measure, expected]: see benchmarks.grid_tables
    later                   cells that begin only after all seeds of the others
    slots                   how many of the workers one run takes (1 unless given)
    together                how many runs one process trains at once on a GPU, for a program that can (1 unless given)
    curves                  quantities of the history that benchmarks.results_page draws
    remark                  what is to be said of the results, on that page

A program is called with its options and ``--seed S --out FOLDER --device D --data DIR``, and ``--deadline UNIXTIME``
where time is limited. At its end it writes ``result.json`` with ``measures``. At the deadline, or at SIGTERM, it may
write ``checkpoint.pt`` and end; called again, it goes on from there. With ``--several FILE`` a program trains the runs
whose arguments the JSON file lists; it writes why one failed into ``log.txt`` in the folder of that run.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import logging
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from benchmarks.grid_tables import write_json, write_tables
from benchmarks.mps import MultiProcessService

logger = logging.getLogger("benchmarks.grid")

PLANS = Path(__file__).parent / "plans"
ROOT = Path(__file__).parents[1]
FIELDS = {
    "title",
    "paper",
    "expect",
    "program",
    "options",
    "tiny",
    "cells",
    "seeds",
    "measures",
    "pairs",
    "slots",
    "later",
    "together",
    "curves",
    "remark",
}
RESULT, CHECKPOINT, STATE = "result.json", "checkpoint.pt", "run.json"
SEVERAL = "several.json"
LOG = "log.txt"
ANOTHER_RUN = "run:"
BROKEN_OFF = 75  # exit code of a run that wrote a checkpoint to go on from (EX_TEMPFAIL)
COMMIT = "HF_FNL_COMMIT"  # environment variable that names the commit where there is no .git
TAIL = 15  # lines of a failed run's log
WORKERS = {"cpu": 1, "cuda": 12}
WITHOUT_MPS = 4  # processes that share a GPU take turns then
SHORTEST = 20.0  # seconds that a run of unknown length needs to be begun
LEAST_SHARE = 0.4  # of the time of many runs in one process that one alone takes at least
TABLES = 4.0  # seconds for tables and the archive after all runs have ended
GRACE = 8.0  # seconds between SIGTERM and SIGKILL
DONE, RUNNING, BROKEN, FAILED, LEFT = "done", "running", "broken off", "failed", "left"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid as its file describes it; see the top of this module."""

    name: str
    title: str
    program: str
    cells: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int]
    measures: Sequence[str]
    paper: str = ""
    expect: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    pairs: Sequence[Sequence[str]] = ()
    slots: int = 1
    later: Sequence[str] = ()
    together: int = 1
    curves: Sequence[str] = ()
    remark: str = ""


def read_plan(name: str, changes: Mapping[str, Any] | None = None) -> Plan:
    """Read a plan by its name in ``benchmarks/plans``, or by the path of its file.

    Args:
        name: Which.
        changes: Options in the place of those in the file; the plan's name and title say so.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a field is unknown or absent, or a pair or a ``run:`` names no cell.
    """
    path = Path(name) if name.endswith(".yaml") else PLANS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in PLANS.glob("*.yaml"))
        raise FileNotFoundError(f"no plan {name!r}; there are {', '.join(known)}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if unknown := sorted(set(found) - FIELDS):
        raise ValueError(f"{path.name}: no field {unknown[0]!r}; there are {', '.join(sorted(FIELDS))}")
    if missing := sorted({"title", "program", "cells", "seeds", "measures"} - set(found)):
        raise ValueError(f"{path.name} lacks {missing[0]!r}")
    found["cells"] = {cell: options or {} for cell, options in found["cells"].items()}
    stem = path.stem
    if changes:
        found["options"] = {**found.get("options", {}), **changes}
        shown = [f"{option}={value}" for option, value in changes.items()]
        stem, found["title"] = "-".join([stem, *shown]), f"{found['title']}, with {', '.join(shown)}"
    plan = Plan(name=stem, **found)
    named = [(cell, "pairs") for pair in plan.pairs for cell in pair[:2]] + [(cell, "later") for cell in plan.later]
    named += [(other, cell) for cell, options in plan.cells.items() for other in _other_cells(options).values()]
    for cell, where in named:
        if cell not in plan.cells:
            raise ValueError(f"{path.name}: {where} names no cell {cell!r}; there are {', '.join(plan.cells)}")
    return plan


def _other_cells(options: Mapping[str, Any]) -> dict[str, str]:
    """Options that are the folder of another cell's run, with the name of that cell."""
    texts = {option: value for option, value in options.items() if isinstance(value, str)}
    return {o: text.removeprefix(ANOTHER_RUN) for o, text in texts.items() if text.startswith(ANOTHER_RUN)}


@dataclass(kw_only=True)
class Run:
    """One training: a cell of a plan with one seed."""

    plan: Plan
    cell: str
    seed: int
    out: Path
    tiny: bool = False
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    stopped: bool = False
    others: int = 0  # runs beside it in its process

    @property
    def name(self) -> str:
        """How it is called in the log."""
        return f"{self.plan.name} {self.cell} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return folder_of(self.out, self.plan, self.cell, self.seed)

    @property
    def options(self) -> dict[str, Any]:
        """What the plan says of it."""
        return {**self.plan.options, **self.plan.cells[self.cell], **(self.plan.tiny if self.tiny else {})}

    @property
    def flags(self) -> list[str]:
        """The options as words of a command line."""
        options = self.options
        for option, cell in _other_cells(options).items():
            options[option] = str(folder_of(self.out, self.plan, cell, self.seed))
        return list(_words(options))

    @property
    def waits(self) -> bool:
        """Whether another run that it needs is not done."""
        cells = _other_cells(self.options).values()
        return any(read_result(folder_of(self.out, self.plan, cell, self.seed)) is None for cell in cells)

    @property
    def state(self) -> str:
        """How far it is."""
        if self.process is not None:
            return RUNNING
        if read_result(self.folder) is not None:
            return DONE
        if _is_alive(self.record().get("process")):  # of another runner
            return RUNNING
        if self.record().get("failed"):
            return FAILED
        return BROKEN if (self.folder / CHECKPOINT).exists() else LEFT

    def record(self) -> dict[str, Any]:
        """What is known of earlier attempts: ``options``, ``seconds``, ``attempts`` and, if the last failed, why."""
        path = self.folder / STATE
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return found

    def check(self) -> None:
        """Raise a ``ValueError`` if the folder holds a run with other options."""
        earlier = self.record().get("options", self.options)
        if earlier != self.options:
            raise ValueError(
                f"{self.folder} was trained with {earlier}, and the plan says {self.options} now: take another --out, "
                "or remove that folder"
            )

    def words(self, device: str, data: Path, deadline: float | None) -> list[str]:
        """What its program is called with."""
        words = [*self.flags, "--seed", str(self.seed), "--out", str(self.folder), "--device", device]
        return [*words, "--data", str(data), *([] if deadline is None else ["--deadline", f"{deadline:.0f}"])]

    def begin(self, process: subprocess.Popen[bytes], others: int) -> None:
        """Note that it has begun, or goes on, in a process that trains others, too."""
        attempts = self.record().get("attempts", 0) + 1
        self.process, self.started, self.stopped, self.others = process, time.time(), False, others
        self._write(attempts=attempts, failed=None, process=process.pid, together=1 + others)

    def poll(self) -> bool:
        """Whether it has ended; how is in its record then."""
        if self.process is None:
            return False
        code = self.process.poll()
        if code is None and (not self.others or read_result(self.folder) is None):
            return False
        self.process = None
        seconds = self.record().get("seconds", 0.0) + time.time() - self.started
        is_broken_off = self.stopped or (code == BROKEN_OFF and not self.others)
        is_broken_off |= bool(self.others) and (self.folder / CHECKPOINT).exists()
        failed = None
        if read_result(self.folder) is None and not is_broken_off:
            failed = [f"ended with code {code} and no {RESULT}", *self._last_lines()]
        self._write(seconds=seconds, failed=failed, process=None)
        return True

    def stop(self, number: int) -> None:
        """Send a signal to its processes."""
        if self.process is not None:
            self.stopped = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def _last_lines(self) -> list[str]:
        """The end of its log, and of that of a process that trained several."""
        logs = [self.folder / LOG, *([self.folder.parent / LOG] if self.others else [])]
        texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists()]
        return [line for text in texts for line in text.splitlines()[-TAIL:]]

    def _write(self, **values: Any) -> None:
        write_json(self.folder / STATE, {**self.record(), "options": self.options, **values})


def start(runs: Sequence[Run], device: str, data: Path, deadline: float | None, environment: Mapping[str, str]) -> None:
    """Begin runs of one plan in one process, or go on with them."""
    plan, folder = runs[0].plan, runs[0].folder if len(runs) == 1 else runs[0].folder.parent
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
    words = runs[0].words(device, data, deadline)
    if len(runs) > 1:
        write_json(folder / SEVERAL, [run.words(device, data, deadline) for run in runs])
        words = ["--several", str(folder / SEVERAL)]
    command = [sys.executable, "-m", plan.program, *words]
    with (folder / LOG).open("ab") as log:
        log.write(f"$ {shlex.join(['python', *command[1:]])}\n".encode())
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
    for run in runs:
        run.begin(process, len(runs) - 1)


def _is_alive(process: int | None) -> bool:
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def folder_of(out: Path, plan: Plan, cell: str, seed: int) -> Path:
    """Where the run of a cell with a seed writes."""
    return out / plan.name / f"{cell}-s{seed}"


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what a run that is done has written, or ``None``."""
    try:
        found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and "measures" in found else None


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if value is None or value is False:
            continue
        yield f"--{name}"
        if value is not True:
            yield from (str(entry) for entry in (value if isinstance(value, list) else [value]))


def runs_of(plans: Sequence[Plan], out: Path, *, tiny: bool = False) -> list[Run]:
    """Return all runs in the order in which they are begun: plan by plan, and in it seed by seed."""
    return [
        Run(plan=plan, cell=cell, seed=seed, out=out, tiny=tiny)
        for plan in plans
        for is_later in (False, True)
        for seed in plan.seeds
        for cell in plan.cells
        if (cell in plan.later) == is_later
    ]


def expected_seconds(run: Run, runs: Sequence[Run], together: int = 1) -> float | None:
    """Return how long a run will yet take, by those of its plan, or of its cell, that are done; ``None`` if none is.

    Args:
        run: Which.
        runs: All.
        together: Runs in its process, whose time is taken to go with their number, but not below ``LEAST_SHARE``.
    """
    done = [other for other in runs if other.plan is run.plan and other.state == DONE]
    records = [other.record() for other in done if other.cell == run.cell] or [other.record() for other in done]
    seconds = [
        record["seconds"] * max(LEAST_SHARE, min(1.0, together / record.get("together", 1)))
        for record in records
        if record.get("seconds")
    ]
    if not seconds:
        return None
    spent = run.record().get("seconds", 0.0) if run.state == BROKEN else 0.0
    return max(statistics.median(seconds) - spent, 0.1 * statistics.median(seconds))


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


def commit() -> str:
    """Return the commit of the code: that in the environment, or that of the checkout, or nothing."""
    if given := os.environ.get(COMMIT):
        return given
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


class _ends_on_signals:
    """Context in which SIGTERM is what an interruption by the keyboard is."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt


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
