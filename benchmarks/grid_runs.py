"""Plans of grids, and the runs that they consist of.

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

import contextlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from benchmarks.grid_tables import write_json

PLANS = Path(__file__).parent / "plans"
ROOT = Path(__file__).parents[1]
RESULT, CHECKPOINT, STATE, LOG = "result.json", "checkpoint.pt", "run.json", "log.txt"
SEVERAL = "several.json"
ANOTHER_RUN = "run:"
BROKEN_OFF = 75  # exit code of a run that wrote a checkpoint to go on from (EX_TEMPFAIL)
COMMIT = "HF_FNL_COMMIT"  # environment variable that names the commit where there is no .git
TAIL = 15  # lines of a failed run's log
LEAST_SHARE = 0.4  # of the time of many runs in one process that one alone takes at least
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
        plans = sorted(file.stem for file in PLANS.glob("*.yaml"))
        raise FileNotFoundError(f"no plan {name!r}; there are {', '.join(plans)}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = {each.name for each in fields(Plan)} - {"name"}
    if unknown := sorted(set(found) - known):
        raise ValueError(f"{path.name}: no field {unknown[0]!r}; there are {', '.join(sorted(known))}")
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


def commit() -> str:
    """Return the commit of the code: that in the environment, or that of the checkout, or nothing."""
    if given := os.environ.get(COMMIT):
        return given
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
