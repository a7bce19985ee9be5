"""Seeded trials: what strikes which training when, what is repaired, and what has to hold afterwards."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.fault_site import Attempt, Site, defect, digest, read_events, small_disk

STEPS = 14
TOLERANCE = 1e-6


class Broken(Exception):
    """Something that must hold after a fault does not."""


@dataclass(frozen=True)
class Trial:
    """What is drawn for one trial; when and where its fault strikes is drawn on the way, from the same seed."""

    number: int
    seed: int
    fault: str
    engine: str
    checkpoint_format: str
    async_save: bool
    save_steps: int
    save_total_limit: int | None
    training_seed: int

    @classmethod
    def draw(cls, number: int, seed: int, faults: Sequence[str], engines: Sequence[str]) -> Trial:
        """The trial of a number; faults take turns, so that all are met equally often."""
        rng = random.Random(f"{seed}/{number}")
        fault = faults[number % len(faults)]
        return cls(
            number=number,
            seed=seed,
            fault=fault,
            engine=engines[number // len(faults) % len(engines)],
            checkpoint_format=rng.choice(["full", "sharded"]),
            async_save=rng.random() < 0.5,
            save_steps=rng.randint(2, 4),
            # A small disk has to fill up, and only checkpoints that stay do that.
            save_total_limit=None if fault == "disk" else rng.choice([None, 2]),
            training_seed=rng.randrange(3),
        )

    def rng(self) -> random.Random:
        """The source of everything else that is random."""
        return random.Random(f"{self.seed}/{self.number}/strike")

    def flags(self) -> list[str]:
        """The flags that the script gets for it."""
        given = {name: value for name, value in asdict(self).items() if name in _TRAINING_FLAGS and value is not None}
        return [*training_flags(self.training_seed), *(f"--{name}={value}" for name, value in given.items())]


_TRAINING_FLAGS = ("checkpoint_format", "async_save", "save_steps", "save_total_limit")


def training_flags(seed: int) -> list[str]:
    """The flags that decide upon the curve of losses."""
    return [f"--max_steps={STEPS}", f"--seed={seed}"]


class Watch:
    """Looks after every start whether what was safe before is still there, and knows from where the next may go on."""

    def __init__(self, trial: Trial, site: Site) -> None:
        self._trial, self._site = trial, site
        self._digests: dict[int, str] = {}
        self._damaged: set[str] = set()
        self.repeated = 0

    def look(self) -> None:
        """Check the checkpoints after the latest start.

        Raises:
            Broken: If one is not whole that has the name of a whole one, or one is gone.
        """
        folders = self._site.checkpoints()
        digests = {step: digest(path) for step, path in folders.items()}
        found = {step: folders[step] for step in folders if digests[step] not in self._damaged}
        if defects := [problem for path in found.values() if (problem := defect(path))]:
            raise Broken(f"not whole under its final name: {'; '.join(defects)}")
        latest = self._site.attempts[-1]
        in_flight = self._trial.async_save and not latest.ended_well
        promised = latest.saved[:-1] if in_flight else latest.saved
        limit = self._trial.save_total_limit
        for step in {*promised, *self._digests} - set(found):
            if limit is None or sum(other > step for other in found) < limit:
                raise Broken(f"checkpoint-{step} was there and is gone; left are {sorted(found)}")
        if changed := [step for step in self._digests if digests.get(step, self._digests[step]) != self._digests[step]]:
            raise Broken(f"the files of checkpoint-{changed[0]} are others than before")
        self._digests = {step: digests[step] for step in found}

    def forget(self, step: int) -> None:
        """Stop expecting a checkpoint, which was damaged on purpose, until another one is in its place."""
        del self._digests[step]
        self._damaged.add(digest(self._site.checkpoints()[step]))

    @property
    def newest(self) -> int:
        """The step from which the next start has to go on."""
        return max(self._digests, default=0)

    def resume(self, strike: Callable[[Path, list[BaseProcess]], None] | None = None) -> Attempt:
        """Start again, and look.

        Raises:
            Broken: If it went on from elsewhere than the newest whole checkpoint, or that was too long ago.
        """
        done = max((max(attempt.losses, default=0) for attempt in self._site.attempts), default=0)
        newest = self.newest
        # A checkpoint that was written and had yet to be renamed counts if it is found to be whole.
        allowed = {newest, *(step for step in self._site.begun() - set(self._site.checkpoints()) if step > newest)}
        attempt = self._site.run(strike)
        if attempt.begin is not None and attempt.begin not in allowed:
            raise Broken(f"it went on from step {attempt.begin}, the newest whole checkpoint was of step {newest}")
        if attempt.begin is not None:
            self.repeated = max(self.repeated, done - attempt.begin)
        self.look()
        return attempt


def kill(trial: Trial, site: Site, watch: Watch, rng: random.Random, size: int) -> dict[str, Any]:
    """SIGKILL of a random process at a random step or while a checkpoint is being written, once or twice."""
    told = []
    for _ in range(rng.choice([1, 1, 2])):
        told.append(_kill_once(trial, site, watch, rng))
    limit = trial.save_steps * (2 if trial.async_save else 1)
    final = _finish(watch)
    if watch.repeated > limit:
        raise Broken(f"{watch.repeated} steps were lost, with a checkpoint every {trial.save_steps}")
    return {**final, "strike": "; ".join(told)}


def _kill_once(trial: Trial, site: Site, watch: Watch, rng: random.Random) -> str:
    victim, grace = rng.randrange(len(site.hosts)), rng.choice([0, rng.uniform(0, 1)])
    reached, delay = _moment(trial, site, watch.newest, rng)
    unfinished: list[str] = []

    def strike(folder: Path, processes: list[BaseProcess]) -> None:
        _await(partial(reached, folder), processes)
        time.sleep(delay)
        processes[victim].kill()
        processes[victim].join()
        unfinished.extend(path.name for path in site.checkpoints_folder.glob("*checkpoint-*"))
        time.sleep(grace)  # as a launcher does, which ends the others when it sees that one has died
        for process in processes:
            process.kill()

    attempt = watch.resume(strike)
    if attempt.ended_well:
        return f"process {victim}, which had ended"
    whole = {path.name for path in site.checkpoints().values()}
    where = f"while {left[0]} was there" if (left := sorted(set(unfinished) - whole)) else "between checkpoints"
    return f"process {victim} after step {max(attempt.losses, default=0)}, {where}"


def _moment(trial: Trial, site: Site, first: int, rng: random.Random) -> tuple[Callable[[Path], bool], float]:
    """What to wait for, and how many seconds then, in a start that goes on from step ``first``."""
    saves = range(first + trial.save_steps, STEPS, trial.save_steps)
    kind, ahead = rng.choices(["save", "step", "start"], [6, 3, 1])[0], rng.random()
    if kind == "start":
        return lambda folder: True, rng.uniform(0, 1)
    if kind == "save" and saves:
        step = saves[int(ahead * len(saves))]
        return lambda folder: step in site.begun(), rng.uniform(0, 0.06)
    return partial(_step_is_done, first + 1 + int(ahead * (STEPS - first - 1))), rng.uniform(0, 0.03)


def _step_is_done(step: int, folder: Path) -> bool:
    return any(event.get("step", 0) >= step for event in read_events(folder))


def _await(condition: Callable[[], bool], processes: Sequence[BaseProcess]) -> None:
    while not condition() and all(process.is_alive() for process in processes):
        time.sleep(0.001)


def disk(trial: Trial, site: Site, watch: Watch, rng: random.Random, size: int) -> dict[str, Any]:
    """A disk that fills up while a checkpoint is being written."""
    # At least three checkpoints are written.
    space = int(size * (rng.randrange(3) + rng.uniform(0.1, 0.9)))
    with small_disk(site.output, space) as enlarge:
        attempt = watch.resume()
        if attempt.ended_well or None in attempt.codes:
            raise Broken(f"with {space:,} bytes on the disk it {attempt.ending()}")
        if not any("No space left" in error and "checkpoint-" in error for error in attempt.errors):
            raise Broken(f"no error says that there is no space for which checkpoint: {attempt.ending()}")
        kept = sorted(site.checkpoints())
        enlarge()
        return {**_finish(watch), "strike": f"{space:,} bytes on the disk, {len(kept)} checkpoints on it"}


def damage(trial: Trial, site: Site, watch: Watch, rng: random.Random, size: int) -> dict[str, Any]:
    """A file of a checkpoint that is cut, or one of its bytes changed, while nothing runs."""
    stop = rng.randint(2 * trial.save_steps + 1, STEPS - 1)

    def strike(folder: Path, processes: list[BaseProcess]) -> None:
        _await(partial(_step_is_done, stop, folder), processes)
        for process in processes:
            process.kill()

    watch.resume(strike)
    found = sorted(site.checkpoints())
    if not found:
        raise Broken(f"no checkpoint after {stop} steps, with one every {trial.save_steps}")
    step = found[-1] if rng.random() < 0.7 else rng.choice(found)
    told, name = _damage_a_file(site.checkpoints()[step], rng)
    watch.forget(step)
    told = f"checkpoint-{step}/{told}"
    attempt = watch.resume()
    says = any(f"checkpoint-{step}" in line and name in line for line in attempt.log.splitlines())
    if step == found[-1] and not says:
        raise Broken(f"nothing says that {told}; it {attempt.ending()}")
    if not attempt.ended_well and len(found) == 1 and any(name in error for error in attempt.errors):
        return {"outcome": "refused, naming the file", "strike": told}
    return {**_ended(attempt), "strike": told}


def _damage_a_file(checkpoint: Path, rng: random.Random) -> tuple[str, str]:
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    content, name = bytearray(path.read_bytes()), str(path.relative_to(checkpoint))
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        path.write_bytes(content[:place])
        return f"{name} cut to {place:,} of {len(content):,} bytes", name
    content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content)
    return f"{name} changed in byte {place:,} of {len(content):,}", name


def data(trial: Trial, site: Site, watch: Watch, rng: random.Random, size: int) -> dict[str, Any]:
    """A data file that is missing on one host at the start, or vanishes from it while it trains."""
    rank, at_start = rng.randrange(len(site.hosts)), rng.random() < 0.5
    path = rng.choice(sorted((site.hosts[rank] / "data").iterdir()))
    away, step = path.with_suffix(".away"), rng.randint(1, STEPS // 2)

    def strike(folder: Path, processes: list[BaseProcess]) -> None:
        _await(partial(_step_is_done, step, folder), processes)
        path.rename(away)

    if at_start:
        path.rename(away)
    attempt = watch.resume(None if at_start else strike)
    told = f"{path.name} of process {rank} {'at the start' if at_start else f'after step {step}'}"
    away.rename(path)
    if attempt.ended_well and not at_start:
        return {"outcome": "unharmed", "strike": f"{told}, not needed again"}
    wanted = len(site.hosts) if at_start else 1
    if None in attempt.codes or sum(path.name in error for error in attempt.errors) < wanted:
        raise Broken(f"{told}: it {attempt.ending()}, where errors should name the file")
    return {**_finish(watch), "strike": told}


def _finish(watch: Watch) -> dict[str, Any]:
    return _ended(watch.resume())


def _ended(attempt: Attempt) -> dict[str, Any]:
    if not attempt.ended_well:
        raise Broken(f"starting again: {attempt.ending()}")
    return {"outcome": "resumed"}


FAULTS = {"kill": kill, "disk": disk, "damage": damage, "data": data}


def run_trial(trial: Trial, folder: Path, corpus: Path, curve: Mapping[int, float], size: int) -> dict[str, Any]:
    """Carry out a trial.

    Args:
        trial: Which.
        folder: Where; it must not be there yet.
        corpus: Folder of the data.
        curve: The losses of an undisturbed run, by step.
        size: Bytes of a checkpoint.

    Returns:
        ``outcome`` and what can be said about it; ``outcome`` is ``failed`` if something is ``broken``.
    """
    started = time.monotonic()
    site = Site(folder, corpus, trial.engine, trial.flags())
    watch = Watch(trial, site)
    try:
        facts = FAULTS[trial.fault](trial, site, watch, trial.rng(), size)
        facts |= _compare(site.attempts, curve, complete="refused" not in facts["outcome"])
    except Broken as broken:
        facts = {"outcome": "failed", "broken": str(broken)}
    facts |= {"repeated_steps": watch.repeated, "starts": len(site.attempts)}
    return {**asdict(trial), **facts, "seconds": round(time.monotonic() - started, 1)}


def _compare(attempts: Sequence[Attempt], curve: Mapping[int, float], complete: bool) -> dict[str, Any]:
    pairs = [(loss, curve[step]) for attempt in attempts for step, loss in attempt.losses.items()]
    seen = {step for attempt in attempts for step in attempt.losses}
    if complete and seen != set(curve):
        raise Broken(f"steps {sorted(set(curve) - seen)} are missing from the curve")
    difference = max((abs(loss - expected) for loss, expected in pairs), default=0.0)
    # Written so that a loss that is no number fails too.
    if not difference <= TOLERANCE:
        steps = [s for a in attempts for s, loss in a.losses.items() if not abs(loss - curve[s]) <= TOLERANCE]
        raise Broken(f"the curve is another one from step {min(steps)} on, by up to {difference:.2g}")
    return {"bitwise": all(loss == expected for loss, expected in pairs)}


def can_mount() -> bool:
    """Whether this process may mount a file system."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    folder = Path(tempfile.mkdtemp())
    try:
        with small_disk(folder, 1 << 16):
            return True
    except subprocess.CalledProcessError:
        return False
    finally:
        folder.rmdir()
