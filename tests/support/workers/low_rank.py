"""Worker of a data-parallel run in which the model becomes low-rank; writes losses, weights and what ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from low_rank_cases import low_rank_trainer, tiny_gpt2
from training_cases import losses


def main(output_dir: str, batch_size: str) -> None:
    options = {"per_device_train_batch_size": int(batch_size), "low_rank_lr_scale": 0.5}
    trainer = low_rank_trainer(output_dir, tiny_gpt2(dropout=0.0), **options)
    trainer.train()
    gathered = trainer.accelerator.gather(torch.cat([p.detach().flatten() for p in trainer.model.parameters()])[None])
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), Path(output_dir) / "weights.pt")
        facts = {
            "losses": losses(trainer),
            "world_size": trainer.args.world_size,
            "wrapper": type(trainer.model_wrapped).__name__,
            "largest_difference": (gathered - gathered[0]).abs().max().item(),
        }
        (Path(output_dir) / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
