"""One of several processes: does runs under engines one after another, and writes what came of each."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes
import torch
from torch.distributed.fsdp import FSDPModule

from hf_fnl.training.engines import innermost
from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_cases import engine_trainer, train_and_measure


def train(folder: Path, engine: str, name: str) -> None:
    """Do one run and write its facts and weights into a folder."""
    trainer = engine_trainer(folder, engine, name, torch.distributed.get_world_size())
    facts = train_and_measure(trainer, name, evaluates_before=not engine.startswith("zero"))
    weights = {key: full(value) for key, value in trainer.model.named_parameters()}
    if trainer.is_world_process_zero():
        torch.save(weights, folder / "weights.pt")
        facts["distributed_type"] = str(trainer.accelerator.distributed_type)
        facts["units"] = sorted(
            {type(module).__name__ for module in trainer.model.modules() if isinstance(module, FSDPModule)}
        )
        facts["optimizer"] = type(innermost(trainer.optimizer)).__name__
        (folder / "facts.json").write_text(json.dumps(facts))


def full(parameter: torch.Tensor) -> torch.Tensor:
    """All of a parameter; every process must ask for it."""
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().detach().cpu()
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        with zero.GatheredParameters(parameter):
            return parameter.detach().clone()
    return parameter.detach().clone()


def forget_engine() -> None:
    """Remove what accelerate noted of an engine in the environment."""
    for variable in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[variable]


def main(folder: str, *runs: str) -> None:
    torch.distributed.init_process_group("gloo")
    for engine, name in (run.split("/") for run in runs):
        if engine != "launched":
            forget_engine()
        into = Path(folder) / engine / name
        into.mkdir(parents=True, exist_ok=True)
        train(into, engine, name)
        gc.collect()


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
