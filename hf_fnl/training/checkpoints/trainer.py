"""A Trainer whose checkpoints appear whole or not at all, and that goes on from one on any engine."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_fnl.optim.sharding import shards_of
from hf_fnl.training.checkpoints.collecting import (
    OPTIMIZER_FILE,
    Part,
    collect,
    opened,
    options_of,
    restore_options,
    restore_state,
    restore_weights,
)
from hf_fnl.training.checkpoints.contents import UnsupportedStateError
from hf_fnl.training.checkpoints.engines import counters_of, forget_old_names_, restore_counters, whole_state_dict
from hf_fnl.training.checkpoints.folders import checkpoint_folder, clean, rotate
from hf_fnl.training.checkpoints.manifest import MANIFEST_FILE
from hf_fnl.training.checkpoints.pieces import PIECES_FILES, pieces_file
from hf_fnl.training.checkpoints.random_numbers import restore_random_numbers
from hf_fnl.training.checkpoints.resume import check_whole, newest_whole
from hf_fnl.training.checkpoints.saving import Saving
from hf_fnl.training.engines import EngineTrainer, innermost
from hf_fnl.training.finite import check_finite
from hf_fnl.utils.files import write_json
from hf_fnl.utils.processes import first_decides, process, together

logger = logging.getLogger(__name__)


class CheckpointingTrainer(EngineTrainer):
    """Transformers' Trainer with checkpoints of :mod:`hf_fnl.training.checkpoints`.

    A checkpoint holds the weights, whole as Transformers writes them or in parts; the state of the optimizer in parts,
    one file a process, see :mod:`~hf_fnl.training.checkpoints.pieces`; what else the Trainer writes; and a manifest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        forget_old_names_(self.accelerator.unwrap_model(self.model))
        self._saving = Saving(self.args.ddp_timeout)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As in Transformers; where its parameters lie is followed from here on."""
        built = super().create_optimizer(model)
        shards_of(innermost(built))
        return built

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Transformers, but whole or not at all, on every engine in one format, and no weights that are NaN."""
        check_finite(self.accelerator.unwrap_model(self.model), self.accelerator, f"at step {self.state.global_step}")
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial))
        checkpoint = checkpoint_folder(run, self.state.global_step)
        self._note_best(checkpoint)
        with self._saving.of(checkpoint) as folder:
            together(lambda: self._write_small(folder))
            write = self._writer(folder)
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            keep = {checkpoint, *([Path(best)] if best else [])}
            self._saving.run(write, lambda: rotate(run, limit, keep), background=self.args.async_save)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _note_best(self, checkpoint: Path) -> None:
        if self.state.best_global_step:
            best = checkpoint_folder(checkpoint.parent, self.state.best_global_step)
            if best == checkpoint or best.exists():
                self.state.best_model_checkpoint = str(best)

    def _write_small(self, folder: Path) -> None:
        """What is written at once: schedule, scaler, random numbers, state of the run, and a sharded model's config."""
        if not self.args.save_only_model:
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
                optimizer = innermost(self.optimizer)
                record = {"class": type(optimizer).__name__, "groups": options_of(optimizer)}
                write_json(folder / OPTIMIZER_FILE, record | {"engine": counters_of(self.model_wrapped)})
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            if self.args.checkpoint_format == "sharded":
                self._save(str(folder), state_dict={})
                for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
                    (folder / name).unlink(missing_ok=True)
            self._note_callbacks()
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _note_callbacks(self) -> None:
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                name, state = type(callback).__name__, callback.state()
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(state)
                else:
                    self.state.stateful_callbacks[name] = state

    def _writer(self, folder: Path) -> Callable[[], Sequence[Path]]:
        """What writes the large part of a checkpoint that is this process's; copied if training goes on meanwhile."""
        full, background = self.args.checkpoint_format == "full", self.args.async_save
        optimizer = None if self.args.save_only_model else innermost(self.optimizer)
        part = self._collect(optimizer, weights=not full)
        weights = self._weights_for_saving(copied=background) if full else None
        if background and part is not None:
            part = part.on_host()
        path = folder / pieces_file(*process())

        def write() -> list[Path]:
            if full:
                self._save(str(folder), state_dict=weights)
            if part is None:
                if self.args.should_save:
                    torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
                return []
            part.write(path)
            return [path]

        return write

    def _collect(self, optimizer: Optimizer | None, *, weights: bool) -> Part | None:
        """The part of this process; ``None`` if the optimizer's state can only be written as Transformers does."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        try:
            return collect(model, optimizer, weights=weights)
        except UnsupportedStateError:
            if weights or self.args.async_save or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise
            return None

    def _weights_for_saving(self, *, copied: bool) -> dict[str, Tensor] | None:
        weights = whole_state_dict(self)
        if not copied or not self.args.should_save:
            return weights
        if weights is None:
            weights = self.accelerator.unwrap_model(self.model, keep_torch_compile=False).state_dict()
        keys = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in weights.items()}
        copies = {keys[name]: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
        return {name: copies[key] for name, key in keys.items()}  # tied weights stay tied

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Transformers, and the whole model also where an engine's settings would have parts of it saved.

        Raises:
            ValueError: If a parameter holds NaN or Inf; nothing is written then.
        """
        check_finite(self.accelerator.unwrap_model(self.model), self.accelerator, "and are to be saved")
        weights = whole_state_dict(self)
        if weights is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._saving.poll()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._saving.finish()
        return super()._finalize_training(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; goes on only from a whole checkpoint, and from the newest of those if told ``True``."""
        folder = self._checked(resume_from_checkpoint)
        if folder is not None:
            self._before_resuming(folder)
        try:
            return super().train(folder, *args, **kwargs)
        except BaseException:
            self._saving.abandon()
            raise

    def _checked(self, given: str | os.PathLike[str] | bool | None) -> str | None:
        """The checkpoint to go on from, which is whole."""
        run = Path(self.args.output_dir)
        if given is True:
            newest = newest_whole(run)
            if newest is None:
                raise ValueError(f"there is no checkpoint in output_dir {run} to go on from")
            return str(newest)
        first_decides(lambda: clean(run))
        if not given:
            return None
        check_whole(Path(given))
        return str(given)

    def _before_resuming(self, checkpoint: str) -> None:
        """Called before anything of a checkpoint is loaded."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As in Transformers; what a checkpoint of ours holds is put back when the engine has taken everything over."""
        ours = resume_from_checkpoint is not None and is_ours(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None if ours else resume_from_checkpoint)
        if ours:
            assert resume_from_checkpoint is not None
            self._restore(Path(resume_from_checkpoint))
        return prepared

    def _restore(self, checkpoint: Path) -> None:
        if not list(checkpoint.glob(PIECES_FILES)):
            self._load_optimizer_and_scheduler(str(checkpoint))
            self._load_scaler(str(checkpoint))
            return
        optimizer = innermost(self.optimizer)
        with opened(checkpoint) as stored:
            restore_weights(stored, self._unwrapped(), optimizer)
            if not (checkpoint / OPTIMIZER_FILE).is_file():
                logger.warning("%s holds the model only: the optimizer and its schedule start anew", checkpoint)
                return
            record = json.loads((checkpoint / OPTIMIZER_FILE).read_text(encoding="utf-8"))
            if record["class"] != type(optimizer).__name__:
                raise ValueError(
                    f"the optimizer of {checkpoint} is {record['class']} and that of this run "
                    f"{type(optimizer).__name__}: set optim to that of the checkpoint"
                )
            restore_state(stored, optimizer)
        restore_options(record["groups"], optimizer)
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
        self._load_scaler(str(checkpoint))
        restore_counters(record["engine"], self.model_wrapped)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers, where a run that had all its steps trains one more when it is resumed."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in Transformers; also weights that were saved in parts."""
        if not holds_parts(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with opened(Path(resume_from_checkpoint)) as stored:
            restore_weights(stored, self._unwrapped())

    def _load_best_model(self) -> None:
        """As in Transformers; on every engine, and also weights that were saved in parts."""
        best = self.state.best_model_checkpoint
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if not is_ours(best) or not (sharded or holds_parts(best)):
            super()._load_best_model()
            return
        with opened(Path(best)) as stored:
            restore_weights(stored, self._unwrapped(), innermost(self.optimizer))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in Transformers; also where another number of processes goes on than wrote the checkpoint."""
        if checkpoint is None or not is_ours(checkpoint) or not restore_random_numbers(Path(checkpoint), self.args):
            super()._load_rng_state(checkpoint)

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def is_ours(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint was written by this package, with a manifest."""
    return (Path(checkpoint) / MANIFEST_FILE).is_file()


def holds_parts(checkpoint: str | os.PathLike[str]) -> bool:
    """Whether the weights of a checkpoint were saved in parts, so that there is no file for ``from_pretrained``."""
    folder = Path(checkpoint)
    whole = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return any(folder.glob(PIECES_FILES)) and not any((folder / name).is_file() for name in whole)
