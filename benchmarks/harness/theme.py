"""A theme of the benchmarks: what it checks, and what it times."""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness.machine import machine
from benchmarks.harness.record import revision, write_result
from benchmarks.harness.tables import workload_tables
from benchmarks.harness.timing import Row
from hf_fnl.utils.files import write_text

T = TypeVar("T")
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Options:
    """How a theme runs.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        size: ``"full"``, ``"quick"`` (minutes, smaller) or ``"tiny"`` (seconds: whether it runs at all).
        command: The command line that measures the same again.
        out: Folder of the results.
    """

    device: str
    size: str
    command: str
    out: Path

    def pick(self, *, full: T, quick: T, tiny: T) -> T:
        """The one that belongs to the size."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return torch.device(self.device).type == "cuda"


@dataclass(frozen=True)
class Theme:
    """What is measured together.

    Args:
        name: As given on the command line, and of the files.
        check: Raises a ``RuntimeError`` if something that would be timed gives a wrong answer.
        measure: Rows, most of them from :class:`~benchmarks.harness.timing.Comparison`; what a peer that is missing
            would have been is a row with ``not_measured``, the reason.
        environment: Names of environment variables on which the results depend; they are part of the command.
    """

    name: str
    check: Callable[[Options], object]
    measure: Callable[[Options], Iterable[Row]]
    environment: tuple[str, ...] = ()

    def run(self, options: Options) -> dict[str, Any]:
        """Check and measure; the results are written as they come and returned."""
        self.check(options)
        variables = [f"{name}={os.environ[name]}" for name in self.environment if name in os.environ]
        result: dict[str, Any] = {
            "theme": self.name,
            "command": " ".join([*variables, options.command]),
            **revision(),
            "machine": machine(options.device),
            "rows": [],
            "complete": False,
        }
        for row in self.measure(options):
            result["rows"].append(row)
            self._write(result, options)
        result["complete"] = True
        self._write(result, options)
        return result

    def _write(self, result: dict[str, Any], options: Options) -> None:
        path = options.out / f"{self.name}-{options.device}.json"
        write_result(path, result)
        if result["complete"]:
            parts = [*workload_tables(result["rows"]), f"`{result['command']}`"]
            write_text(path.with_suffix(".md"), "\n\n".join(parts) + "\n")


def theme(name: str) -> Theme:
    """The theme of this name."""
    found: Theme = importlib.import_module(f"benchmarks.themes.{name}").THEME
    return found


def parser(description: str | None) -> argparse.ArgumentParser:
    """Of the options that every theme has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--quick", dest="size", action="store_const", const="quick", default="full", help="smaller")
    options.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="only to see that it runs")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and Markdown")
    return options


def options_of(name: str, given: argparse.Namespace, argv: Sequence[str] | None) -> Options:
    """The options of one theme among those that were asked for."""
    arguments = [argument for argument in (sys.argv[1:] if argv is None else argv) if argument.startswith("--")]
    flags = [argument for argument in arguments if argument.partition("=")[0] in ("--quick", "--tiny")]
    command = ["python", "-m", "benchmarks", name, "--device", given.device, *flags]
    return Options(given.device, given.size, shlex.join(command), given.out)
