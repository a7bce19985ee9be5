"""Worker of a run under torchrun that loses its first process once, while its checkpoint may still be on its way."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hf_fnl.utils.processes import leave

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "run_scripts"))
import pretrain_bert
from transformers import TrainerCallback
from transformers import trainer as transformers_trainer

from benchmarks.fault_worker import Recorder

LOST_AT = 6


class Loss(TrainerCallback):
    """Kills this process when it comes to a step for the first time."""

    def on_save(self, args, state, control, **kwargs):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and state.global_step == LOST_AT and args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    transformers_trainer.DEFAULT_CALLBACKS.extend([Recorder, Loss])
    pretrain_bert.main(sys.argv[1:])
    leave()
