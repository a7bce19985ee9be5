"""Worker of a data-parallel run: trains the tiny problem and writes losses, weights and what ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from training_cases import losses, tiny_model, tiny_trainer


def main(output_dir: str, batch_size: str, accumulation: str, stock: str) -> None:
    trainer = tiny_trainer(
        output_dir,
        tiny_model(stock=bool(int(stock))),
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=int(accumulation),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), Path(output_dir) / "weights.pt")
        facts = {
            "losses": losses(trainer),
            "world_size": trainer.args.world_size,
            "distributed_type": str(trainer.accelerator.distributed_type),
            "optimizer": type(trainer.optimizer.optimizer).__name__,
        }
        (Path(output_dir) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
