"""One of several processes: does runs one after another, each from a checkpoint or from the start.

What each does is one entry of a JSON file: the folder to write, the engine, and what to go on from.
"""

from __future__ import annotations

import gc
import json
import logging
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


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def record(trainer: FLAMBeTrainer, resume: str | None) -> None:
    """Do one run and write its facts and weights."""
    folder, messages = Path(trainer.args.output_dir), Messages()
    logging.getLogger("hf_fnl").addHandler(messages)
    trainer.train(resume_from_checkpoint=resume)
    logging.getLogger("hf_fnl").removeHandler(messages)
    trainer.save_model(str(folder / "final"))
    weights = {name: full(parameter) for name, parameter in trainer.model.named_parameters()}
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        torch.save(weights, folder / "weights.pt")
        facts = {"losses": losses(trainer), "rates": rates, "messages": messages.texts}
        (folder / "facts.json").write_text(json.dumps(facts))


def main(plan: str) -> None:
    torch.distributed.init_process_group("gloo")
    number, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for job in json.loads(Path(plan).read_text()):
        forget_engine()
        Path(job["folder"]).mkdir(parents=True, exist_ok=True)
        try:
            record(checkpoint_trainer(Path(job["folder"]), job["engine"], world_size), job["resume"])
        except Exception:
            (Path(job["folder"]) / f"error-{number}.txt").write_text(traceback.format_exc())
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
