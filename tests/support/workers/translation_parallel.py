"""Worker of a data-parallel translation run: trains the tiny problem, resumes it, and writes losses and batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
from accelerate.utils import gather_object
from training_cases import losses
from translation_cases import tiny_trainer

from hf_fnl.tasks.translation_training import TranslationTrainer


def train(output_dir: Path, resume: Path | None = None) -> tuple[TranslationTrainer, list]:
    """A trained trainer, and the labels of every batch by process."""
    trainer = tiny_trainer(output_dir, max_steps=7, save_strategy="steps", save_steps=3)
    seen, training_step = [], trainer.training_step

    def watched_step(model, inputs, num_items_in_batch=None):
        seen.append(inputs["labels"].tolist())
        return training_step(model, inputs, num_items_in_batch)

    trainer.training_step = watched_step
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, gather_object([seen])


def main(output_dir: str) -> None:
    folder = Path(output_dir)
    trainer, batches = train(folder / "whole")
    resumed, resumed_batches = train(folder / "resumed", folder / "whole" / "checkpoint-3")
    if trainer.is_world_process_zero():
        facts = {
            "losses": losses(trainer),
            "resumed_losses": losses(resumed),
            "batches": batches,
            "resumed_batches": resumed_batches,
            "steps_per_epoch": len(trainer.get_train_dataloader()),
            "distributed_type": str(trainer.accelerator.distributed_type),
        }
        (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
    close_process_group()
