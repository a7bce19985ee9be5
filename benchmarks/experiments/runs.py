"""Trainings of rows: planned, skipped where done, taken up where broken off, several at once."""

from __future__ import annotations

import dataclasses
import functools
import os
import runpy
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.experiments.rows import SCALES, Row, Settings
from benchmarks.harness.grids import run_once
from hf_fnl.utils.files import write_text
from hf_fnl.utils.suggest import did_you_mean

ROOT = Path(__file__).parents[2]  # where trainings run, so that their commands hold no path of this machine
DONE, HALF_DONE, TO_DO, DATA_MISSING = "done", "half done", "to do", "data missing"
METRICS_FILE = "metrics.json"
TAIL = 15  # lines of a failed run's log


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a column of a row, with one seed."""

    row: Row
    column: str
    seed: int
    scale: str
    settings: Settings  # all flags but those that say where things lie
    folder: Path
    command: Sequence[str] | None  # none where the data are missing

    @property
    def name(self) -> str:
        """How it is called in lists."""
        return f"{self.row.path} {self.column} seed {self.seed}"

    @property
    def state(self) -> str:
        """How far it is."""
        if (self.folder / METRICS_FILE).exists():
            return DONE
        if self.command is None:
            return DATA_MISSING
        return HALF_DONE if any(self.folder.glob("**/checkpoint-*")) else TO_DO  # phases have folders of their own

    def train(self, threads: int) -> dict[str, Any]:
        """Run it unless it is done.

        Args:
            threads: Of its process, unless the environment sets ``OMP_NUM_THREADS``.

        Returns:
            Its metrics, command, seconds and peak memory, see :func:`benchmarks.common.run_once`.

        Raises:
            ValueError: If the folder holds a run of another command.
            RuntimeError: If it failed; the message ends with the last lines of its log.
        """
        assert self.command is not None
        self._claim(shlex.join(self.command))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        done = self.folder / METRICS_FILE
        try:
            return run_once(list(self.command), done, working_folder=ROOT, environment=environment)
        except RuntimeError as error:
            lines = self._beside("log").read_text(encoding="utf-8", errors="replace").splitlines()
            raise RuntimeError("\n".join([f"{self.name} failed:", *lines[-TAIL:]])) from error

    def _claim(self, command: str) -> None:
        """Write the command beside the folder, or see that what is there was trained with it."""
        file = self._beside("command")
        earlier = file.read_text(encoding="utf-8") if file.exists() and self.state != TO_DO else command
        if earlier != command:
            raise ValueError(
                f"{self.name} was trained with other flags:\n{earlier}\nThey are now:\n{command}\n"
                f"Take another --runs, or remove {relative(self.folder)} and the files beside it"
            )
        write_text(file, command)

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{suffix}")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How rows become trainings.

    Args:
        script: What trains in place of the tables' own scripts; it reads its flags into dataclasses.
        runs: Folder of all runs; those of the two scales do not meet in it.
        places: Where data sets lie, as :func:`data_places` gives them.
        scale: ``"full"`` or ``"small"``.
        extra: Flags of every training, before which those of rows give way.

    Raises:
        FileNotFoundError: If there is no such script.
    """

    runs: Path
    places: Mapping[str, str | None]
    script: Path | None = None
    scale: str = "full"
    extra: Settings = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.script is not None and not self.script.is_file():
            raise FileNotFoundError(f"no such script: {self.script}")

    def plan(self, rows: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
        """All trainings of rows, the first seed of every row before the second of any.

        Raises:
            FileNotFoundError: If a table names a script that is not there.
            ValueError: If a row or ``extra`` has a flag that the script does not have.
        """
        rows = [row for row in rows if row.trained]
        for row in rows:
            script = self._script(row)
            _check(self.extra, script, "--extra")
            flags = [flag for column in row.paper for scale in SCALES for flag in row.flags(column, scale)]
            _check(flags, script, row.path)
        return [self._run(row, column, seed) for seed in dict.fromkeys(seeds) for row in rows for column in row.paper]

    def _run(self, row: Row, column: str, seed: int) -> Run:
        folder = self.runs.resolve() / f"{row.table.name}{suffix(self.scale)}" / row.name / column / f"seed{seed}"
        settings = row.flags(column, self.scale) | self.extra
        data = row.data(column)
        command = None
        if data in self.places:
            place = self.places[data]
            known = row.table.datasets[data]
            where = known.hub or {} if place is None else dict.fromkeys(known.place, place)
            command = self._command(self._script(row), settings | where | self.extra, seed, folder)
        return Run(
            row=row, column=column, seed=seed, scale=self.scale, settings=settings, folder=folder, command=command
        )

    def _script(self, row: Row) -> Path:
        return self.script or ROOT / "run_scripts" / row.table.script

    def _command(self, script: Path, settings: Settings, seed: int, folder: Path) -> list[str]:
        habits: Settings = {
            "seed": seed,
            "use_cpu": not torch.cuda.is_available(),
            "report_to": "none",
            "disable_tqdm": True,
            "output_dir": relative(folder),
            "resume_from_checkpoint": True,
        }
        return [relative(script), *_words(settings | habits)]


def _check(flags: Iterable[str], script: Path, source: str) -> None:
    if unknown := sorted(set(flags) - _flags_of(script)):
        hint = did_you_mean(unknown[0], _flags_of(script))
        raise ValueError(f"{source}: {relative(script)} has no flag {unknown[0]}{hint}")


@functools.cache
def _flags_of(script: Path) -> set[str]:
    """Fields of all dataclasses that a script names."""
    if not script.is_file():
        raise FileNotFoundError(f"no such script: {script}")
    is_ours = script.parent == ROOT / "run_scripts"
    names = vars(import_module(f"hf_fnl.scripts.{script.stem}")) if is_ours else runpy.run_path(str(script))
    kinds = [kind for kind in names.values() if isinstance(kind, type)]
    return {option.name for kind in kinds if dataclasses.is_dataclass(kind) for option in dataclasses.fields(kind)}


def _words(settings: Settings) -> Iterator[str]:
    for flag, value in settings.items():
        yield f"--{flag}"
        for entry in value if isinstance(value, list) else [value]:
            yield str(entry).lower() if isinstance(entry, bool) else str(entry)


def settings_of(words: Sequence[str]) -> Settings:
    """Flags and their values, as rows hold them, from a command line.

    Raises:
        ValueError: If a value comes before any flag.
    """
    settings: dict[str, list[Any]] = {}
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.removeprefix("--").partition("=")
            settings[flag] = [yaml.safe_load(value)] if equals else []
        elif not settings:
            raise ValueError(f"--extra takes flags like --width 8, got {word!r} first")
        else:
            settings[flag].append(yaml.safe_load(word))
    return {flag: values[0] if len(values) == 1 else values or True for flag, values in settings.items()}


def suffix(scale: str) -> str:
    """What tells files of a scale from those of the full one."""
    return "" if scale == "full" else f"-{scale}"


def relative(path: str | Path) -> str:
    """A path as it is seen from the repository's root."""
    return os.path.relpath(path, ROOT)


def data_places(entries: Sequence[str], rows: Sequence[Row]) -> dict[str, str | None]:
    """Where data sets lie, from ``NAME=PLACE``, or ``NAME`` for the one on the Hub.

    Returns:
        Place of each data set that is at hand, ``None`` for the Hub.

    Raises:
        ValueError: If no row knows the name, or the Hub has no such data.
        FileNotFoundError: If there is nothing at the place.
    """
    names = {name: known for row in rows for name, known in sorted(row.table.datasets.items())}
    places: dict[str, str | None] = {}
    for entry in entries:
        name, _, place = entry.partition("=")
        if name not in names:
            raise ValueError(f"--data: no data set {name!r}; there are {', '.join(names)}{did_you_mean(name, names)}")
        if not place and names[name].hub is None:
            raise ValueError(f"--data {name}: it is not on the Hub; give {name}=FOLDER")
        if place and not Path(place).exists():
            raise FileNotFoundError(f"--data {name}: no such file or folder: {place}; give {name} alone for the Hub's")
        places[name] = relative(place) if place else None
    return places


def train_all(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, Future[dict[str, Any]]]]:
    """Train what has its data, ``jobs`` processes at once, each with its share of the cores.

    Yields:
        Each run as it ends, with what :meth:`Run.train` returned or raised.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(run.train, threads): run for run in runs if run.command is not None}
        for future in as_completed(futures):
            yield futures[future], future
    finally:
        pool.shutdown(cancel_futures=True)
