"""Trainings by two processes that are killed, fill their disk, and lose files, in a loop of seeded trials.

After every fault the training is started again as it was started before. It has to give the losses of an undisturbed
run at every step, or an error that names the file, and no checkpoint that was whole may be lost.

python -m benchmarks.faults --trials 50 --seed 0
python -m benchmarks.faults --seed 0 --trial 17
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.fault_site import Site, write_corpus
from benchmarks.fault_trials import FAULTS, STEPS, Trial, can_mount, run_trial, training_flags
from benchmarks.fault_worker import ENGINES, call, import_engines
from benchmarks.house.machine import machine
from benchmarks.house.record import revision, write_result

RESULT = Path(__file__).parent / "results" / "faults.json"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="what the results hold is not repeated unless it failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), help="faults that strike")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--trial", type=int, help="repeat this one alone, write no results and keep its folder")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), help="folder of the trainings")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON of the results")
    return parser.parse_args(argv)


class Undisturbed:
    """The runs that nothing happens to, one for each engine and seed, made when they are asked for first."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self._folder, self._corpus = folder, corpus

    def run(self, engine: str, seed: int) -> tuple[dict[int, float], int]:
        """Its losses by step, and the bytes of its only checkpoint, which it writes after the last."""
        folder = self._folder / f"{engine}-{seed}"
        facts = folder / "facts.json"
        if not facts.exists():
            shutil.rmtree(folder, ignore_errors=True)
            site = Site(folder, self._corpus, engine, [*training_flags(seed), f"--save_steps={STEPS}"])
            attempt = site.run()
            if not attempt.ended_well:
                raise RuntimeError(f"an undisturbed run with {engine} failed: {attempt.ending()}; see {attempt.folder}")
            if (engine_run := attempt.events[0]["engine"]) != ENGINES[engine]:
                raise RuntimeError(f"{engine} was asked for and {engine_run} ran; see {attempt.folder}")
            checkpoint = site.checkpoints()[STEPS]
            size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
            write_result(facts, {"losses": attempt.losses, "bytes": size})
        found = json.loads(facts.read_text())
        return {int(step): loss for step, loss in found["losses"].items()}, found["bytes"]


def carry_out(trial: Trial, work: Path) -> dict[str, Any]:
    """Run one trial in ``work/trial-N``."""
    folder = work / f"trial-{trial.number}"
    shutil.rmtree(folder, ignore_errors=True)
    corpus = work / "corpus" / "data"
    losses, size = Undisturbed(work / "undisturbed", corpus).run(trial.engine, trial.training_seed)
    facts = json.dumps(run_trial(trial, folder, corpus, losses, size))
    return json.loads(facts.replace(f"{folder}/", ""))


def summary(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts by fault and outcome, and how many of the curves are the same to the last bit."""
    faults = sorted({trial["fault"] for trial in trials})
    resumed = [trial for trial in trials if "bitwise" in trial]
    return {
        "counts": {f: dict(Counter(trial["outcome"] for trial in trials if trial["fault"] == f)) for f in faults},
        "by_engine": dict(Counter(trial["engine"] for trial in trials)),
        "bitwise": f"{sum(trial['bitwise'] for trial in resumed)} of {len(resumed)}",
        "seconds": round(sum(trial["seconds"] for trial in trials)),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the trials that the results lack; returns the results."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(arguments)
    work = options.work.resolve()
    import_engines()
    shutil.rmtree(work / "undisturbed", ignore_errors=True)
    if not (work / "corpus" / "tokenizer").exists():
        shutil.rmtree(work / "corpus", ignore_errors=True)
        call(write_corpus, work / "corpus" / "data")
    if options.trial is not None:
        facts = carry_out(Trial.draw(options.trial, options.seed, options.only, options.engines), work)
        print(_line(facts), f"  its folder is {work / f'trial-{options.trial}'}", sep="\n")
        return {"trials": [facts]}
    return _run_grid(options, work, shlex.join(["python", "-m", "benchmarks.faults", *arguments]))


def _run_grid(options: argparse.Namespace, work: Path, command: str) -> dict[str, Any]:
    mounts = can_mount()
    done = {trial["number"]: trial for trial in _earlier(options.out)}
    result: dict[str, Any] = {}
    for number in range(options.trials):
        trial = Trial.draw(number, options.seed, options.only, options.engines)
        earlier = done.get(number, {"outcome": "failed"})
        if asdict(trial).items() <= earlier.items() and earlier["outcome"] != "failed":
            continue
        if trial.fault == "disk" and not mounts:
            facts = {**asdict(trial), "outcome": "skipped: only root may mount a small disk", "seconds": 0}
        else:
            facts = {**carry_out(trial, work), "commit": revision()["commit"]}
        done[number] = facts
        failed = [n for n in sorted(done) if done[n]["outcome"] == "failed"]
        if number not in failed[:1]:
            shutil.rmtree(work / f"trial-{number}", ignore_errors=True)
        rows = [done[n] for n in sorted(done) if n < options.trials]
        result = {"command": command, "machine": machine("cpu"), **summary(rows), "trials": rows}
        result = write_result(options.out, result)
        print(_line(facts), flush=True)
        if failed == [number]:
            print(f"  kept in {work / f'trial-{number}'}; again: {command} --trial {number}", flush=True)
    return result or json.loads(options.out.read_text())


def _earlier(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["trials"] if path.exists() else []


def _line(facts: dict[str, Any]) -> str:
    saving = f"{facts['checkpoint_format']}{', asynchronous' if facts['async_save'] else ''}"
    told = facts.get("broken") or facts.get("strike", "")
    return f"{facts['number']:3} {facts['fault']:6} {facts['engine']:5} {saving}: {facts['outcome']} ({told})"


if __name__ == "__main__":
    print(json.dumps(summary(main()["trials"]), indent=2))
