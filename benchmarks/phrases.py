"""The embedded translation task, learnt from nothing: minutes and BLEU on held-out phrases.

python -m benchmarks.phrases --runs runs/phrases
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.harness.grids import run_once
from benchmarks.harness.machine import machine
from benchmarks.harness.record import write_result

RESULT = Path(__file__).parent / "results" / "phrases.json"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, translate, score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/phrases"), help="where the model and its log go")
    run = parser.parse_args(argv).runs
    flags = f"--use_cpu --bf16 --report_to none --disable_tqdm true --save_strategy no --output_dir {run}"
    metrics = run_once(["run_scripts/train_translation.py", *flags.split()], run / "metrics.json")
    result = {
        "command": metrics["command"],
        "commit": metrics["commit"],
        "machine": machine("cpu"),
        "minutes": metrics["seconds"] / 60,
        "parameters": metrics["parameters"]["total"],
        **metrics["test"],
    }
    return write_result(RESULT, result)


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
