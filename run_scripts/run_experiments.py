"""Train rows of the papers' tables and write the results beside the published numbers.

python run_scripts/run_experiments.py run_scripts/experiments/resnet20_low_rank --scale small \
    --data cifar10=../shared/data/cifar10 --seeds 1 2 3
python run_scripts/run_experiments.py run_scripts/experiments/k21_table3 --data cifar10 cifar100 --list

What is done is skipped, what was broken off goes on, and what fails does not stop the rest.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are no part of the installed package

from benchmarks.experiments.results import add_run
from benchmarks.experiments.rows import SCALES, read_rows
from benchmarks.experiments.runs import (
    DATA_MISSING,
    ROOT,
    Launch,
    data_places,
    relative,
    settings_of,
    train_all,
)
from hf_fnl.training.command_line import UsageError, progress, run_script

logger = logging.getLogger("hf_fnl.experiments")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("rows", type=Path, nargs="+", help="folders of tables, or files of single rows")
    parser.add_argument("--scale", choices=SCALES, default="full", help="small: fewer epochs and channels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of every row")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="NAME[=PLACE]", help="data at hand: in a file or folder, or on the Hub"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "experiments", help="where models and logs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where results go")
    parser.add_argument("--script", type=Path, help="what trains. Default: the script that each table names")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each with its share of the cores")
    parser.add_argument("--list", action="store_true", help="say how far every training is, and stop")
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="flags for every training; comes last")
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {options.jobs}")
    return options


def invocation(options: argparse.Namespace) -> str:
    """The command of a run of this script, without paths of this machine."""
    words = ["python", "run_scripts/run_experiments.py", *map(relative, options.rows), "--scale", options.scale]
    words += ["--seeds", *map(str, options.seeds), "--data"]
    for name, _, place in (entry.partition("=") for entry in options.data):
        words.append(f"{name}={relative(place)}" if place else name)
    return shlex.join([*words, *(["--extra", *options.extra] if options.extra else [])])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, plan, train; returns the state of every training before it, results by table, and what failed by name."""
    options = parse(argv)
    rows = read_rows(options.rows)
    launch = Launch(
        script=options.script,
        runs=options.runs,
        places=data_places(options.data, rows),
        scale=options.scale,
        extra=settings_of(options.extra),
    )
    runs = launch.plan(rows, options.seeds)
    outcome: dict[str, Any] = {"states": {run.name: run.state for run in runs}, "results": {}, "failed": {}}
    if options.list:
        print("\n".join(f"{state:<12}  {name}" for name, state in outcome["states"].items()))
        counts = Counter(outcome["states"].values())
        print(f"\n{len(runs)} in all: {', '.join(f'{count} {state}' for state, count in counts.items())}")
        return outcome
    with progress("trainings", sum(run.command is not None for run in runs)) as bar:
        for run, future in train_all(runs, options.jobs):
            try:
                outcome["results"][run.row.table.name] = add_run(
                    options.out, run, future.result(), invocation(options), [row for row in rows if not row.trained]
                )
                logger.info("%s: done", run.name)
            except (RuntimeError, ValueError) as error:
                outcome["failed"][run.name] = str(error)
                logger.info("%s: failed", run.name)
            bar.update()
    for name, state in outcome["states"].items():
        if state == DATA_MISSING:
            logger.warning("%s: data missing, see --data", name)
    for message in outcome["failed"].values():
        logger.error("%s", message)
    return outcome


def program(arguments: list[str]) -> None:
    """Run, and end with exit status 1 if a training failed."""
    if main(arguments)["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(program)
