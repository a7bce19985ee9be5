"""One of two processes: trains the tiny problem under DDP and FSDP2, without a profile and with one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cpu_fsdp  # noqa: F401  lets accelerate shard over CPU processes

from hf_fnl.utils.processes import leave

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_cases import ENGINES
from engine_runs import forget_engine
from training_cases import losses, tiny_trainer


def main(folder: str) -> None:
    for engine in ("ddp", "fsdp2"):
        found = []
        for profile in ({}, {"profile_steps": 3, "profile_after": 2}):
            forget_engine()
            trainer = tiny_trainer(Path(folder) / engine, **ENGINES[engine], **profile)
            trainer.train()
            found.append(losses(trainer))
        if trainer.is_world_process_zero():
            (Path(folder) / f"{engine}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
