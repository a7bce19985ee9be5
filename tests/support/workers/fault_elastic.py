"""Worker of a run under torchrun that loses its first process once, in the middle of a save."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hf_fnl.utils.processes import close_process_group

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[3]))
from training_cases import tiny_trainer
from transformers import TrainerCallback

from benchmarks.fault_worker import Recorder
from hf_fnl.training.runs import checkpoint_to_resume

LOST_AT, STEPS, SAVE_STEPS = 6, 11, 3


class Loss(TrainerCallback):
    """Kills this process when it comes to a checkpoint for the first time, before the list of its files is written."""

    def on_save(self, args, state, control, **kwargs):
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and state.global_step == LOST_AT and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, batch_size: str) -> None:
    options = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "resume_from_checkpoint": "true"}
    options |= {"save_strategy": "steps", "per_device_train_batch_size": int(batch_size)}
    trainer = tiny_trainer(folder, **options)
    trainer.callback_handler.callbacks.insert(0, Loss())
    trainer.add_callback(Recorder(Path(folder) / f"events-{trainer.args.process_index}.jsonl"))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args))
    close_process_group()
