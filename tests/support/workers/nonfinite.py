"""Worker: in one of two processes the loss of one step is infinite; writes what became of every run."""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes
import torch

from hf_fnl.utils.processes import close_process_group, process

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_cases import ENGINES, forget_engine
from training_cases import tiny_trainer


def run(folder: Path, engine: str) -> dict[str, Any]:
    trainer = tiny_trainer(folder / engine, **ENGINES[engine])
    compute, rank = trainer.compute_loss, process()[0]

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        return loss + math.inf if rank == 1 and trainer.state.global_step == 2 else loss

    trainer.compute_loss = compute_loss
    error = ""
    try:
        trainer.train()
    except ValueError as raised:
        error = str(raised)
    return {"engine": str(trainer.accelerator.distributed_type), "error": error}


def main(output_dir: str, *engines: str) -> None:
    torch.distributed.init_process_group("gloo")
    found = {}
    for engine in engines:
        forget_engine(engine)
        found[engine] = run(Path(output_dir), engine)
        gc.collect()
    (Path(output_dir) / f"{process()[0]}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
