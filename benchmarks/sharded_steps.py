"""One of two processes: times the steps of a small BERT under engines and optimizers, in turns.

``torchrun ... benchmarks/sharded_steps.py FILE TURNS STEPS HIDDEN_SIZE ENGINE/OPTIMIZER ...``
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "workers")]

import cpu_fsdp  # noqa: F401, E402  lets accelerate shard over CPU processes
from engine_runs import forget_engine  # noqa: E402
from traffic import options_of  # noqa: E402
from traffic_cases import LENGTH, traffic_examples, traffic_model  # noqa: E402

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments  # noqa: E402
from hf_fnl.training.profiling import Profile  # noqa: E402
from hf_fnl.utils.processes import leave  # noqa: E402

WARMUP = 3


def steps_of(engine: str, optimizer: str, steps: int, hidden_size: str) -> list[dict[str, float]]:
    """Seconds by phase of the steps of a training; none but in the first process."""
    found: list[Profile] = []
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none"}
        args = FLAMBeTrainingArguments(
            output_dir=folder,
            max_steps=WARMUP + steps,
            per_device_train_batch_size=2,
            use_cpu=True,
            disable_tqdm=True,
            profile_steps=steps,
            profile_after=WARMUP,
            **quiet,
            **options_of(engine, "1", "fp32", optimizer),
        )
        trainer = FLAMBeTrainer(traffic_model("cpu", hidden_size), args, train_dataset=traffic_examples(LENGTH) * 8)
        assert trainer.profiler is not None
        trainer.profiler.show = found.append
        trainer.train()
    return list(found[0].steps) if found else []


def main(file: str, turns: str, steps: str, hidden_size: str, *cases: str) -> None:
    """Time every case once a turn; the first process writes the steps of all turns, by case."""
    seconds: dict[str, list[list[dict[str, float]]]] = {case: [] for case in cases}
    for _ in range(int(turns)):
        for case in cases:
            forget_engine()
            seconds[case].append(steps_of(*case.split("/"), int(steps), hidden_size))
            gc.collect()
    if seconds[cases[0]][0]:
        Path(file).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
