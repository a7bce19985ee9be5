"""Trainings by two processes that are struck, in a loop of seeded trials, and started again as they were started.

They have to give the losses of an undisturbed run at every step, or an error that names what is wrong, and no
checkpoint that was complete may be lost.

python -m benchmarks.faults --trials 49 --seed 0
python -m benchmarks.faults --seed 0 --trial 17
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.fault_worker import ENGINES, STEPS, Job, start, wait, write_data
from benchmarks.harness.machine import machine
from benchmarks.harness.record import command_line, revision, write_result
from hf_fnl.training.checkpoints import checkpoint_folder, checkpoints
from hf_fnl.training.manifest import MANIFEST_FILE, fault

RESULT = Path(__file__).parent / "results" / "faults.json"
SECONDS = 120.0  # a hundred times what a start takes: what has not ended by then hangs
TOLERANCE = 1e-6
EXTENSIONS = "extensions"  # what DeepSpeed compiles for a CPU

Strike = Callable[[list[BaseProcess]], None]


class Broken(Exception):
    """Something that must hold after a fault does not."""


class Attempt:
    """What the processes of one start left."""

    def __init__(self, log: Path, codes: Sequence[int | None]) -> None:
        self.codes = codes
        self.events = read_events(log)
        self.begin = next((event["begin"] for event in self.events if "begin" in event), None)
        self.losses = {event["step"]: event["loss"] for event in self.events if "step" in event}
        self.errors = [path.read_text() for path in sorted(log.glob("error-*.txt"))]
        self.said = "\n".join(path.read_text(errors="replace") for path in sorted(log.glob("log-*.txt")))

    def ending(self) -> str:
        """Return how it ended, in a line."""
        if None in self.codes:
            return f"hung for {SECONDS:.0f} s"
        return "ended well" if not any(self.codes) else f"exit codes {self.codes}: {' | '.join(self.errors)[:500]}"


def read_events(log: Path) -> list[dict[str, Any]]:
    """Return the events that the first process has written to their ends by now."""
    path = log / "events-0.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Trial:
    """One fault and one training, which is started until it is done; everything is drawn from two numbers.

    Args:
        number: Faults and engines take turns with it.
        seed: Of all trials.
        work: Folder of the trials.
    """

    def __init__(self, number: int, seed: int, work: Path) -> None:
        self.rng = random.Random(f"{seed}/{number}")
        self.fault = list(FAULTS)[number % len(FAULTS)]
        self.engine = list(ENGINES)[number // len(FAULTS) % len(ENGINES)]
        self.folder = work / f"trial-{number}"
        limit = None if self.fault == "disk" else self.rng.choice([None, 1, 2])
        self.job = Job(
            *(self.folder / "0", self.folder / "run", self.engine), self.rng.randrange(2), self.rng.randint(2, 4), limit
        )
        self.attempts: list[Attempt] = []
        self.damaged: set[int] = set()

    def logs(self) -> Path:
        """Return the folder of the next start."""
        return self.folder / str(len(self.attempts))

    def complete(self) -> set[int]:
        """Return the steps of the complete checkpoints."""
        return {int(path.name.partition("-")[2]) for path in checkpoints(self.job.run) if fault(path) is None}

    def go(self, strike: Strike | None = None, **changes: Any) -> Attempt:
        """Start the training once more, from the newest complete checkpoint, and look at what it left.

        Raises:
            Broken: If it hung, went on from elsewhere, or lost a complete checkpoint that had to stay.
        """
        before, log = self.complete(), self.logs()
        for lock in (self.folder.parent / EXTENSIONS).rglob("lock"):  # of torch's, which outlives a killed process
            lock.unlink()
        processes = start(replace(self.job, log=log, **changes))
        if strike is not None:
            strike(processes)
        attempt = Attempt(log, wait(processes, SECONDS))
        self.attempts.append(attempt)
        if None in attempt.codes:
            raise Broken(attempt.ending())
        # What was still being written when it was looked at may be complete when it is started.
        if attempt.begin is not None and attempt.begin != max(before, default=0) and not changes:
            raise Broken(f"it went on from step {attempt.begin}; complete were {sorted(before)}")
        after, limit = self.complete(), self.job.save_total_limit
        lost = [step for step in before - after if limit is None or sum(each > step for each in after) < limit]
        if lost:
            raise Broken(f"checkpoint-{lost[0]} was complete and is not any more; left are {sorted(after)}")
        return attempt

    def finish(self) -> None:
        """Start until the end, once.

        Raises:
            Broken: If that fails.
        """
        attempt = self.go()
        if any(attempt.codes):
            raise Broken(f"starting again: {attempt.ending()}")

    def compare(self, curve: dict[int, float]) -> bool:
        """Compare all losses with those of an undisturbed run; returns whether they agree to the last bit."""
        pairs = [(loss, curve[step]) for attempt in self.attempts for step, loss in attempt.losses.items()]
        if missing := curve.keys() - {step for attempt in self.attempts for step in attempt.losses}:
            raise Broken(f"steps {sorted(missing)} are missing from the curve")
        if not all(abs(loss - expected) <= TOLERANCE for loss, expected in pairs):
            raise Broken("the curve is another one")
        return all(loss == expected for loss, expected in pairs)


def reaches(trial: Trial, step: int, processes: Sequence[BaseProcess]) -> None:
    """Wait until the running start has done a step."""
    log = trial.logs()
    while all(p.is_alive() for p in processes) and all(e.get("step", 0) < step for e in read_events(log)):
        time.sleep(0.002)


def kill(trial: Trial) -> str:
    """SIGKILL of a process at a random step, while it starts, or in the middle of a save."""
    rng, told = trial.rng, []
    for _ in range(rng.choice([1, 1, 2])):
        victim, kind, delay = rng.randrange(2), rng.choice(["save", "save", "step", "start"]), rng.uniform(0, 0.08)
        first = max(trial.complete(), default=0)
        step = rng.randrange(first + 1, STEPS + 1) if first < STEPS else STEPS
        saved = checkpoint_folder(trial.job.run, min(first + trial.job.save_steps * rng.randint(1, 2), STEPS))

        def strike(processes: list[BaseProcess], kind=kind, step=step, saved=saved, victim=victim, delay=delay) -> None:
            if kind == "step":
                reaches(trial, step, processes)
            while kind == "save" and not saved.exists() and all(p.is_alive() for p in processes):
                time.sleep(0.001)
            time.sleep(delay)
            processes[victim].kill()
            time.sleep(delay)
            for process in processes:  # as a launcher does, which ends the others when it sees that one has died
                process.kill()

        attempt = trial.go(strike)
        if any(attempt.codes):
            told.append(f"process {victim} after step {max(attempt.losses, default=0)} ({kind})")
    trial.finish()
    return "; ".join(told) or "it had ended"


def disk(trial: Trial) -> str:
    """A disk that fills up while a checkpoint is being written."""
    reference = undisturbed_folder(trial) / "run" / f"checkpoint-{STEPS}"
    size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    space = int(size * trial.rng.uniform(0.2, 2.9))  # three checkpoints are written at least
    with small_disk(trial.job.run, space) as enlarge:
        attempt = trial.go()
        if not any("No space left" in error and "checkpoint-" in error for error in attempt.errors):
            raise Broken(f"no error says that there is no space for which checkpoint: {attempt.ending()}")
        kept = sorted(trial.complete())
        enlarge()
        trial.finish()
    return f"{space:,} bytes on the disk; complete were {kept}"


@contextlib.contextmanager
def small_disk(folder: Path, space: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of some bytes at a folder; gives what enlarges it."""

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)

    folder.mkdir(parents=True, exist_ok=True)
    mount(f"size={space}")
    try:
        yield lambda: mount("remount,size=64m")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


def stopped(trial: Trial) -> int:
    """Kill the training somewhere behind its second checkpoint; returns the step of the newest."""
    step = trial.rng.randint(min(2 * trial.job.save_steps + 1, STEPS - 1), STEPS - 1)

    def strike(processes: list[BaseProcess]) -> None:
        reaches(trial, step, processes)
        for process in processes:
            process.kill()

    trial.go(strike)
    return max(trial.complete())


def damage(trial: Trial) -> str:
    """A file of the newest checkpoint that is cut, changed or gone; in every third trial it is the list of files."""
    newest = stopped(trial)
    checkpoint = checkpoint_folder(trial.job.run, newest)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = checkpoint / MANIFEST_FILE if trial.rng.random() < 1 / 3 else trial.rng.choice(files)
    content, how = bytearray(path.read_bytes()), trial.rng.choice(["cut", "changed", "removed"])
    place = trial.rng.randrange(len(content) - 1)
    if how == "removed":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:place])
    else:
        content[place] ^= 1 << trial.rng.randrange(8)
        path.write_bytes(content)
    name = path.relative_to(checkpoint).as_posix()
    told = f"checkpoint-{newest}/{name} {how} at byte {place:,}"
    if fault(checkpoint) is None:
        raise Broken(f"{told} is not seen")
    alone = not trial.complete()
    attempt = trial.go()
    if not any(name in line and checkpoint.name in line for line in attempt.said.splitlines()):
        raise Broken(f"nothing says that {told}: it {attempt.ending()}")
    if alone:  # there is nothing to go on from, which is not decided for a user
        if not attempt.errors or not all(name in error for error in attempt.errors):
            raise Broken(f"{told}, the only one: it {attempt.ending()}")
        shutil.rmtree(checkpoint)
        trial.finish()
    elif any(attempt.codes):
        raise Broken(f"{told}: it {attempt.ending()}")
    return told


def data(trial: Trial) -> str:
    """A data file that vanishes while it trains."""
    file = trial.rng.choice(sorted((trial.folder / "data").iterdir()))
    away, step = file.with_suffix(".away"), trial.rng.randint(0, 2)

    def strike(processes: list[BaseProcess]) -> None:
        reaches(trial, step, processes)
        file.rename(away)

    attempt = trial.go(strike)
    away.rename(file)
    if not any(attempt.codes):
        return f"{file.name} was not needed again"
    if not any(file.name in error for error in attempt.errors):
        raise Broken(f"{file.name} vanished, and no error names it: it {attempt.ending()}")
    trial.finish()
    return f"{file.name} after step {step}"


def two(trial: Trial) -> str:
    """A second run that is started into the folder of the first one."""
    step, seen = trial.rng.randint(1, STEPS // 2), []

    def strike(processes: list[BaseProcess]) -> None:
        reaches(trial, step, processes)
        log = trial.folder / "second"
        second = start(replace(trial.job, log=log, resume=trial.rng.choice(["true", None])), 1)
        seen.append(Attempt(log, wait(second, SECONDS)))

    attempt = trial.go(strike)
    refused = all("is in use by process" in error or "of an earlier run" in error for error in seen[0].errors)
    if any(attempt.codes) or not seen[0].errors or not refused:
        raise Broken(f"the first {attempt.ending()}, the second {seen[0].ending()}")
    return f"at step {step}: {' '.join(seen[0].errors)[:120]}"


def clock(trial: Trial) -> str:
    """Times of files that say nothing of their order, as after a clock that went back."""
    newest = stopped(trial)
    for path in [*checkpoints(trial.job.run), *trial.job.run.rglob("*")]:
        os.utime(path, (trial.rng.uniform(1e9, 3e9),) * 2)
    trial.finish()
    return f"after checkpoint-{newest}"


def fresh(trial: Trial) -> str:
    """A fresh run that is started into a folder with checkpoints of another."""
    newest = stopped(trial)
    complete = trial.complete()
    attempt = trial.go(resume=None, seed=trial.job.seed + 7)
    if len(attempt.errors) != 2 or not all(f"checkpoint-{newest} of an" in error for error in attempt.errors):
        raise Broken(f"a fresh run into the folder of another {attempt.ending()}")
    if trial.complete() != complete:
        raise Broken(f"left of {sorted(complete)} are {sorted(trial.complete())}")
    trial.finish()
    return f"into a folder with {len(complete)} checkpoints"


FAULTS = {each.__name__: each for each in (kill, disk, damage, data, two, clock, fresh)}


def undisturbed_folder(trial: Trial) -> Path:
    """Return the folder of the training of a trial to which nothing happens."""
    return trial.folder.parent / f"undisturbed-{trial.engine}-{trial.job.seed}"


def undisturbed(trial: Trial) -> dict[int, float]:
    """Return the losses of the training of a trial to which nothing happens, by step."""
    folder = undisturbed_folder(trial)
    if not folder.exists():
        write_data(folder / "data")
        job = replace(trial.job, log=folder / "0", run=folder / "run", save_steps=STEPS, resume=None)
        attempt = Attempt(job.log, wait(start(job), 5 * SECONDS))  # DeepSpeed compiles something first
        engine = next((event["engine"] for event in attempt.events if "engine" in event), None)
        if any(attempt.codes) or engine != ENGINES[trial.engine]:
            raise RuntimeError(
                f"an undisturbed run with {trial.engine}, which was {engine}, {attempt.ending()}: {folder}"
            )
    return Attempt(folder / "0", [0]).losses


def carry_out(number: int, seed: int, work: Path) -> dict[str, Any]:
    """Run one trial in ``work/trial-N`` and return what became of it."""
    trial, began = Trial(number, seed, work), time.monotonic()
    shutil.rmtree(trial.folder, ignore_errors=True)
    write_data(trial.folder / "data")
    facts: dict[str, Any] = {"number": number, "fault": trial.fault, "engine": trial.engine}
    if trial.fault == "disk" and os.geteuid() != 0:
        return facts | {"outcome": "skipped: only root may mount a small disk"}
    try:
        curve = undisturbed(trial)
        told = FAULTS[trial.fault](trial)
        facts |= {"outcome": "right", "told": told.replace(f"{trial.folder}/", ""), "bitwise": trial.compare(curve)}
    except Broken as broken:
        facts |= {"outcome": "lost", "told": str(broken).replace(f"{trial.folder}/", "")}
    job = {"save_steps": trial.job.save_steps, "save_total_limit": trial.job.save_total_limit}
    return facts | job | {"starts": len(trial.attempts), "seconds": round(time.monotonic() - began, 1)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the trials; returns the results."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=42)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="run this one alone, write no results and keep its folder")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON of the results")
    options = parser.parse_args(arguments)
    os.environ["DS_ACCELERATOR"] = "cpu"
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(work / EXTENSIONS)
    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401  before processes are forked
    rows = []
    for number in range(options.trials) if options.trial is None else [options.trial]:
        rows.append(carry_out(number, options.seed, work))
        print("{number:3} {fault:6} {engine:5} {outcome}: {told}".format(**{"told": "", **rows[-1]}), flush=True)
        if rows[-1]["outcome"] == "right" and options.trial is None:
            shutil.rmtree(work / f"trial-{number}")
    counts = {name: dict(Counter(row["outcome"] for row in rows if row["fault"] == name)) for name in FAULTS}
    exact = f"{sum(row.get('bitwise', False) for row in rows)} of {len(rows)}"
    result = {
        "command": command_line("benchmarks.faults", arguments),
        "counts": counts,
        "bitwise": exact,
    }
    if options.trial is None:
        result = write_result(options.out, {**result, "machine": machine("cpu"), **revision(), "trials": rows})
    return result


if __name__ == "__main__":
    found = main()
    print(json.dumps({"counts": found["counts"], "bitwise": found["bitwise"]}, indent=2))
