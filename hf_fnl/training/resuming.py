"""Going on from a checkpoint: what is taken from it, what of it wins over this run's options, and what starts anew."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import save as save_distributed
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from hf_fnl.training.checkpoints import read_manifest
from hf_fnl.training.engines import check_optimizer, innermost, set_state_dict_type
from hf_fnl.training.stored import (
    FSDP_MODEL,
    FSDP_SHARDS,
    aliases,
    alone,
    check_same_model,
    engine_of,
    stored_weights,
    weight_files,
)
from hf_fnl.utils.processes import first_decides, is_first
from hf_fnl.utils.suggest import listed

logger = logging.getLogger(__name__)

_CONVERTED = ".converted"
_SMALL = (TRAINER_STATE_NAME, SCHEDULER_NAME, CONFIG_NAME, "rng_state*.pth", "scaler.pt")
_NOT_OPTIONS = {"params", "param_names", "lr"}


class Resumption(TrainerCallback):
    """Checks what the engine and a checkpoint made of the optimizer of a run, before its first step.

    Args:
        trainer: The Trainer, whose ``create_optimizer`` calls :meth:`note`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._checkpoint: Path | None = None
        self._kind: Any = None

    @contextmanager
    def of(self, checkpoint: Path | None) -> Iterator[str | None]:
        """Give the folder that the Trainer goes on from: the checkpoint, or its weights as the engine wants them.

        Raises:
            ValueError: If the checkpoint is of another model, or the engine does not go on from it.
        """
        self._checkpoint = checkpoint
        if checkpoint is None:
            yield None
            return
        trainer = self._trainer
        check_same_model(checkpoint, trainer.accelerator.unwrap_model(trainer.model))
        there, here = engine_of(checkpoint), _engine(trainer)
        facts = _facts(checkpoint)
        self._anew = there != here or not _has_state(checkpoint)
        self._class = None if self._anew else facts.get("optimizer")
        if is_first():
            self._say(there, here, facts.get("processes"))
        self._check_deepspeed(checkpoint, there, here)
        if there == here == "FSDP":
            plugin = trainer.accelerator.state.fsdp_plugin
            self._kind = plugin.state_dict_type
            set_state_dict_type(plugin, _kind_of(checkpoint))
        if there == here or (there == "DeepSpeed" and not trainer.is_fsdp_enabled and weight_files(checkpoint)):
            yield str(checkpoint)
            return
        folder = Path(trainer.args.output_dir) / _CONVERTED
        first_decides(lambda: _convert(checkpoint, folder, trainer))
        try:
            yield str(folder)
        finally:
            if is_first():
                shutil.rmtree(folder, ignore_errors=True)

    def note(self, optimizer: Optimizer) -> None:
        """Remember the optimizer that was built, which the engine has to run.

        Raises:
            ValueError: If the state in the checkpoint is that of another one.
        """
        self._built, self._options = innermost(optimizer), _options(innermost(optimizer))
        name = type(self._built).__name__
        if self._checkpoint is not None and self._class not in (None, name):
            raise ValueError(
                f"the optimizer of {self._checkpoint} is {self._class} and that of this run {name}: set optim to that "
                "of the checkpoint"
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        """Check, and bring the schedule to the step of a checkpoint whose optimizer is not taken."""
        check_optimizer(optimizer, self._built)
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        if self._kind is not None:  # from here on as the engine was configured
            set_state_dict_type(self._trainer.accelerator.state.fsdp_plugin, self._kind)
            self._kind = None
        if self._anew:
            _bring_forward(lr_scheduler, checkpoint, state.global_step)
        elif is_first() and (different := _differences(self._options, _options(self._built))):
            logger.warning("these options come from %s, not from this run: %s", checkpoint, listed(different, 8))
        if is_first():
            for name in (SAFE_WEIGHTS_NAME, FSDP_SHARDS, f"{FSDP_MODEL}.bin"):
                _remove(Path(args.output_dir) / _CONVERTED / name)

    def _check_deepspeed(self, checkpoint: Path, there: str, here: str) -> None:
        """Refuse what DeepSpeed cannot load: other engines' checkpoints, and those of other processes or stages."""
        if here != "DeepSpeed":
            return
        wrong = f"is of {there}" if there != here else None
        engine, count = self._trainer.accelerator.state.deepspeed_plugin, self._trainer.args.world_size
        if wrong is None:
            is_stage_3 = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
            parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
            if is_stage_3 != (engine.zero_stage == 3) or (parts > 0) != (engine.zero_stage > 0):
                wrong = f"is of another stage of ZeRO than {engine.zero_stage}"
            elif parts not in (0, count):
                wrong = f"is of {parts} processes, and this run has {count}"
        if wrong is not None:
            raise ValueError(
                f"DeepSpeed does not go on from {checkpoint}, which {wrong}: begin a run with its weights in another "
                "output_dir (init_from, or from_pretrained), or train on as it was begun"
            )

    def _say(self, there: str, here: str, processes: int | None) -> None:
        """Tell what starts anew."""
        count = self._trainer.args.world_size
        if there != here:
            logger.warning(
                "%s is of %s and this run of %s: its weights, step and schedule are taken, the optimizer starts anew",
                self._checkpoint, there, here,
            )  # fmt: skip
        elif self._anew:
            logger.warning("%s holds no state of an optimizer, which starts anew", self._checkpoint)
        if processes not in (None, count):
            logger.warning(
                "%s is of %d processes and this run of %d: random numbers start anew",
                self._checkpoint,
                processes,
                count,
            )


def _engine(trainer: Any) -> str:
    """Return the engine of a run, in the words of :func:`engine_of`."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    return "FSDP" if trainer.is_fsdp_enabled else "one process or DDP"


def _kind_of(checkpoint: Path) -> str:
    """Return how accelerate saved a checkpoint under FSDP."""
    return "SHARDED_STATE_DICT" if (checkpoint / FSDP_SHARDS).is_dir() else "FULL_STATE_DICT"


def _facts(checkpoint: Path) -> dict[str, Any]:
    """What the list of files says beside the files; nothing where another Trainer wrote the checkpoint."""
    try:
        return read_manifest(checkpoint)
    except FileNotFoundError:
        return {}


def _has_state(checkpoint: Path) -> bool:
    names = (OPTIMIZER_NAME, f"{Path(OPTIMIZER_NAME).stem}.bin", f"{Path(OPTIMIZER_NAME).stem}_0")
    return any((checkpoint / name).exists() for name in names) or any(checkpoint.glob("global_step*"))


def _convert(checkpoint: Path, folder: Path, trainer: Any) -> None:
    """Write the weights of a checkpoint as the engine of a run wants them, and beside them what all engines share."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in (path for pattern in _SMALL for path in checkpoint.glob(pattern)):
        shutil.copy(path, folder)
    weights = stored_weights(checkpoint)
    if not trainer.is_fsdp_enabled:
        save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        return
    model: nn.Module = trainer.accelerator.unwrap_model(trainer.model)
    for names in aliases(model).values():  # tied weights are stored once, and FSDP looks for each
        if stored := [name for name in names if name in weights]:
            weights.update(dict.fromkeys(names, weights[stored[0]]))
    weights = {**model.state_dict(), **weights}
    if "FULL_STATE_DICT" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        torch.save(weights, folder / f"{FSDP_MODEL}.bin")
    else:
        with alone():
            save_distributed({"model": weights}, checkpoint_id=folder / FSDP_SHARDS, no_dist=True)


def _bring_forward(scheduler: Any, checkpoint: Path, step: int) -> None:
    """Bring a schedule, and the learning rates of its optimizer, to the step of a checkpoint."""
    saved = checkpoint / SCHEDULER_NAME
    if saved.is_file():
        scheduler.load_state_dict(torch.load(saved, weights_only=True))
    elif isinstance(scheduler, LambdaLR):
        rates = [base * scale(step) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        now = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        scheduler.load_state_dict({**scheduler.state_dict(), **now})
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=False):
        group["lr"] = rate


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of an optimizer, the rate without its schedule among them."""
    return [
        {"initial_lr": group["lr"]}
        | {
            key: value
            for key, value in group.items()
            if key not in _NOT_OPTIONS and not isinstance(value, torch.Tensor)
        }
        for group in optimizer.param_groups
    ]


def _differences(built: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> list[str]:
    """Options that a checkpoint changed, as ``weight_decay=0.01 (here 0.1)``, each once."""
    found: dict[str, None] = {}
    for here, there in zip(built, loaded, strict=False):
        for key in here.keys() & there.keys():
            if str(here[key]) != str(there[key]):
                name = "learning_rate" if key == "initial_lr" else key
                found[f"{name}={there[key]} (here {here[key]})"] = None
    return sorted(found)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
