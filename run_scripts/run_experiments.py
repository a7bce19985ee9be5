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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are no part of the installed package

from benchmarks.experiments.results import add_run
from benchmarks.experiments.rows import SCALES, read_rows
from benchmarks.experiments.runs import DATA_MISSING, ROOT, Launch, data_places, parse_flags, relative, train_all

logger = logging.getLogger(__name__)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    options = parser.parse_args(argv)
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
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
        extra=parse_flags(options.extra),
    )
    runs = launch.plan(rows, options.seeds)
    outcome: dict[str, Any] = {"states": {run.name: run.state for run in runs}, "results": {}, "failed": {}}
    if options.list:
        print("\n".join(f"{state:<12}  {name}" for name, state in outcome["states"].items()))
        return outcome
    for run, future in train_all(runs, options.jobs):
        try:
            outcome["results"][run.row.table.name] = add_run(
                options.out, run, future.result(), invocation(options), [row for row in rows if not row.trained]
            )
            logger.info("%s: done", run.name)
        except (RuntimeError, ValueError) as error:
            outcome["failed"][run.name] = str(error)
            logger.info("%s: failed", run.name)
    report(outcome)
    return outcome


def report(outcome: dict[str, Any]) -> None:
    """Say what was left out and what failed."""
    for name, state in outcome["states"].items():
        if state == DATA_MISSING:
            logger.warning("%s: data missing, see --data", name)
    for message in outcome["failed"].values():
        logger.error("%s", message)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(bool(main()["failed"]))
