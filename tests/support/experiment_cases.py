"""A table of experiments in small, and a script that stands in for training."""

from __future__ import annotations

# Trains nothing: fails in the mood to, leaves a checkpoint when it is broken off, and says how it was called.
STAND_IN = """
import json, sys
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Flags:
    dataset: str; eval_split: str; model: str; mood: str; epochs: int; milestones: list; nesterov: bool; width: int
    seed: int; use_cpu: bool; report_to: str; disable_tqdm: bool; output_dir: str; resume_from_checkpoint: str

def main():
    flags = dict(zip(sys.argv, sys.argv[1:]))
    folder = Path(flags["--output_dir"])
    again = (folder / "checkpoint-1").is_dir()
    (folder / "checkpoint-1").mkdir(parents=True, exist_ok=True)
    print("one\\ntwo\\nout of luck")
    mood = flags.get("--mood")
    if mood == "bad" or (mood == "breaks off" and not again):
        raise SystemExit(3)
    accuracy = (60 + int(flags["--seed"])) / 100
    metrics = {"parameters": {"total": 77, "ratio": 0.25}, "seconds_per_epoch": 2.5, "resumed": again}
    metrics |= {} if mood == "silent" else {"eval_accuracy": accuracy}
    (folder / "metrics.json").write_text(json.dumps(metrics))

if __name__ == "__main__":
    main()
"""

DATASETS = {"birds": {"hub": {"dataset": "someone/birds", "eval_split": "valid"}, "settings": {"eval_split": "test"}}}
DATASETS["fish"] = {"hub": {"dataset": "someone/fish"}}
TABLE = {
    "title": "A table",
    "source": "page 7",
    "settings": {"epochs": 200, "milestones": [0.5, 0.75]},
    "small": {"epochs": 3},
    "columns": {"birds_10": {"data": "birds"}, "fish": {"data": "fish"}},
}
ROWS = {"dense": {"row": "Dense", "settings": {"model": "m"}, "paper": {"birds_10": "94.30 ± 0.20"}}}


def row(**content) -> dict:
    """A row that reports birds, with more keys or others."""
    return {"row": "A row", "paper": {"birds_10": None}, **content}
