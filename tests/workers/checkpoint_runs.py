"""One of several processes, or the only one: does runs one after another, each from a checkpoint or from the start.

What each does is one entry of a JSON file: the folder to write, the engine, options, and what to go on from. A run that
goes on writes what it took up at once, before its first step, so that it can be compared with the checkpoint.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes
import torch
from transformers import TrainerCallback

from hf_fnl.utils.processes import leave

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoint_cases import checkpoint_trainer, rewritten
from engine_runs import whole
from training_cases import losses


class Rewrite(TrainerCallback):
    """Writes a checkpoint before the first step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._save_checkpoint(self.trainer.model, None)
        self.trainer._saving.finish()
        if self.trainer.is_world_process_zero():
            taken = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            taken.rename(rewritten(Path(args.output_dir)))


class FullDisk:
    """The part of a process that has no space left."""

    def on_host(self) -> FullDisk:
        return self

    def write(self, path: Path) -> None:
        raise OSError(28, "No space left on device")


def train(job: dict[str, Any], world_size: int) -> None:
    """Do one run and write its facts and weights."""
    folder = Path(job["folder"])
    trainer = checkpoint_trainer(folder, job["engine"], world_size, **job.get("options", {}))
    if job.get("fails_on") == torch.distributed.get_rank():
        trainer._collect = lambda *args, **kwargs: FullDisk()
    if job.get("resume"):
        trainer.add_callback(Rewrite(trainer))
    trainer.train(resume_from_checkpoint=job.get("resume"))
    trainer.save_model(str(folder / "final"))
    weights = {name: whole(parameter) for name, parameter in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        torch.save(weights, folder / "weights.pt")
        facts = {"losses": losses(trainer), "engine": str(trainer.accelerator.distributed_type)}
        (folder / "facts.json").write_text(json.dumps(facts))


def main(plan: str) -> None:
    torch.distributed.init_process_group("gloo")
    for job in json.loads(Path(plan).read_text()):
        for variable in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[variable]  # what accelerate noted of the engine before
        Path(job["folder"]).mkdir(parents=True, exist_ok=True)
        try:
            train(job, torch.distributed.get_world_size())
        except Exception:
            number = torch.distributed.get_rank()
            (Path(job["folder"]) / f"error-{number}.txt").write_text(traceback.format_exc())
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
