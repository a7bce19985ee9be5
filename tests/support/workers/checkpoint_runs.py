"""One of several processes: does runs one after another, each from a checkpoint or from the start.

What each does is one entry of a JSON file: the folder to write, the engine, and what to go on from.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes
import torch

from hf_fnl import FLAMBeTrainer
from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoint_cases import checkpoint_trainer
from engine_runs import forget_engine, full
from training_cases import losses


def record(trainer: FLAMBeTrainer, resume: str | None) -> None:
    """Do one run and write its losses and weights."""
    folder = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    weights = {name: full(parameter) for name, parameter in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        torch.save(weights, folder / "weights.pt")
        (folder / "facts.json").write_text(json.dumps({"losses": losses(trainer)}))


def run(job: dict[str, str], number: int, world_size: int) -> None:
    """Do what a job says, as process ``number``, and write down what went wrong."""
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    try:
        record(checkpoint_trainer(folder, job["engine"], world_size), job["resume"])
    except Exception:
        (folder / f"error-{number}.txt").write_text(traceback.format_exc())


def main(plan: str) -> None:
    torch.distributed.init_process_group("gloo")
    number, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for job in json.loads(Path(plan).read_text()):
        forget_engine()
        run(job, number, world_size)
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
