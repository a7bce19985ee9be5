"""The place of one trial: its corpus on every host, its checkpoints, its starts one after the other, what each left."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from benchmarks.fault_worker import Job, start, wait

SECONDS = 120.0  # more than a hundred times what a run takes: what has not ended by then hangs
# So little that each process comes to all of its files within a run.
PARTS, DOCUMENTS = 12, 3
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
MODEL = """
    --hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --max_position_embeddings 16
    --qk_rank 5 --ov_rank 6 --ffn_rank 7 --phases 16 --dropout 0.1
"""
TRAINING = """
    --per_device_train_batch_size 4 --learning_rate 0.01 --logging_steps 1 --use_cpu --report_to none
    --disable_tqdm true --resume_from_checkpoint true --streaming --dataset data
"""


def write_corpus(folder: Path) -> None:
    """Write files of random sentences, and beside their folder a tokenizer of their words."""
    from hf_fnl.tasks.tokenization import train_wordpiece

    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 6))) for _ in range(120)]
    texts = [_document(words, rng) for _ in range(DOCUMENTS * PARTS)]
    folder.mkdir(parents=True)
    for number in range(PARTS):
        lines = [json.dumps({"text": text}) for text in texts[number::PARTS]]
        (folder / f"part-{number:02}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = train_wordpiece(texts, vocab_size=200, lowercase=True)
    tokenizer.save_pretrained(folder.parent / "tokenizer")


def _document(words: Sequence[str], rng: random.Random) -> str:
    return " ".join(" ".join(rng.choices(words, k=rng.randint(4, 9))) + "." for _ in range(4))


@dataclass
class Attempt:
    """One start of the training, and what its processes left."""

    folder: Path
    codes: list[int | None]

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What the first process wrote, in its order."""
        return read_events(self.folder)

    @property
    def begin(self) -> int | None:
        """The step that it went on from; ``None`` if it did not come to training."""
        return next((event["begin"] for event in self.events if "begin" in event), None)

    @property
    def losses(self) -> dict[int, float]:
        """The loss of every step."""
        return {event["step"]: event["loss"] for event in self.events if "step" in event}

    @property
    def saved(self) -> list[int]:
        """The steps at which saving a checkpoint came back without an error."""
        return [event["saved"] for event in self.events if "saved" in event]

    @property
    def errors(self) -> list[str]:
        """The errors with which its processes ended."""
        return [path.read_text() for path in sorted(self.folder.glob("error-*.txt"))]

    @property
    def log(self) -> str:
        """All that the processes said."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log-*.txt")))

    @property
    def ended_well(self) -> bool:
        """Whether all processes ended without an error."""
        return set(self.codes) == {0}

    def ending(self) -> str:
        """How it ended, in a line."""
        if None in self.codes:
            return f"processes hung for {SECONDS:.0f} s: {[r for r, code in enumerate(self.codes) if code is None]}"
        return "ended" if self.ended_well else f"exit codes {self.codes}; {' | '.join(self.errors)[:600]}"


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events that the first process has written whole by now."""
    path = folder / "events-0.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


@dataclass
class Site:
    """The folders of one trial.

    Args:
        folder: Of the trial.
        corpus: Folder of the data, with the tokenizer beside it; it is copied to every host.
        engine: See :data:`~benchmarks.fault_worker.ENGINES`.
        flags: Of the script, beyond those that all trials share.
    """

    folder: Path
    corpus: Path
    engine: str
    flags: Sequence[str]
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = self.folder / "output"
        self.output.mkdir(parents=True)
        self.hosts = [self.folder / f"host-{rank}" for rank in range(2)]
        for host in self.hosts:
            shutil.copytree(self.corpus, host / "data")

    @property
    def checkpoints_folder(self) -> Path:
        """Where the script's only phase puts its checkpoints."""
        return self.output / "phase-1"

    def run(self, strike: Callable[[Path, list[BaseProcess]], None] | None = None) -> Attempt:
        """Start the training and wait for its end; ``strike`` gets the folder of the start and its processes."""
        folder = self.folder / f"start-{len(self.attempts)}"
        own = ["--tokenizer", str(self.corpus.parent / "tokenizer"), "--output_dir", str(self.output)]
        processes = start(Job(folder, [*MODEL.split(), *TRAINING.split(), *own, *self.flags], self.engine, self.hosts))
        if strike is not None:
            strike(folder, processes)
        attempt = Attempt(folder, wait(processes, SECONDS))
        self.attempts.append(attempt)
        return attempt

    def checkpoints(self) -> dict[int, Path]:
        """The folders that have the name of a whole checkpoint, by step."""
        folders = self.checkpoints_folder.glob("checkpoint-*")
        return {int(match[1]): path for path in folders if (match := CHECKPOINT.fullmatch(path.name))}

    def begun(self) -> set[int]:
        """The steps of all checkpoints that are there or being written, under whatever name."""
        names = [path.name for path in self.checkpoints_folder.glob("*")]
        return {int(match[1]) for name in names if (match := CHECKPOINT.search(name))}


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of ``size`` bytes on a folder; yields a function that makes it as large as need be."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def digest(folder: Path) -> str:
    """One hash of the names and the bytes of all files in a folder."""
    hashed = hashlib.blake2b()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        hashed.update(str(path.relative_to(folder)).encode() + hashlib.blake2b(path.read_bytes()).digest())
    return hashed.hexdigest()


def defect(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, found without the code under test; ``None`` if they are whole."""
    if not (checkpoint / "trainer_state.json").exists():
        return f"{checkpoint.name} has no trainer_state.json"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            _read(path)
        except (ValueError, SafetensorError, zipfile.BadZipFile, EOFError) as error:
            return f"{checkpoint.name}/{path.relative_to(checkpoint)}: {error}"
    return None


def _read(path: Path) -> None:
    if path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".safetensors":
        with safe_open(path, framework="numpy"):
            pass
    elif path.suffix in {".pt", ".pth", ".bin"}:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"{broken} in it is broken")
