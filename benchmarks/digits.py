"""The embedded digits, learnt by a low-rank ResNet-20 from nothing: seconds and accuracy on held-out images.

python -m benchmarks.digits --runs runs/digits
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.grids import run_once
from benchmarks.harness.machine import machine
from benchmarks.harness.record import write_result

RESULT = Path(__file__).parent / "results" / "digits.json"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/digits"), help="where the model and its log go")
    run = parser.parse_args(argv).runs
    flags = f"--rank_scale 0.3 --decay frobenius --num_train_epochs 15 --use_cpu --disable_tqdm true --output_dir {run}"
    metrics = run_once(["run_scripts/train_vision.py", *flags.split()], run / "metrics.json")
    figures = ("command", "commit", "seconds", "seconds_per_epoch", "eval_accuracy", "eval_loss")
    result = {
        "machine": machine("cpu"),
        "parameters": metrics["parameters"]["total"],
        **{name: metrics[name] for name in figures},
    }
    return write_result(RESULT, result)


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
