"""Going on from a checkpoint: which one, whether this run can, and whether it does so as it was begun."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME

from hf_fnl.layers.partitioned import full_shape
from hf_fnl.training.checkpoints import check_complete, checkpoints, newest_complete
from hf_fnl.training.command_line import UsageError
from hf_fnl.training.engines import check_optimizer, innermost
from hf_fnl.training.manifest import is_unfinished, read_manifest
from hf_fnl.training.optimizers import check_decay
from hf_fnl.utils.processes import first_decides, is_first
from hf_fnl.utils.suggest import listed

logger = logging.getLogger(__name__)

FSDP_MODEL = "pytorch_model_fsdp"
FSDP_SHARDS = f"{FSDP_MODEL}_0"

_NOT_OPTIONS = {"params", "param_names", "lr"}


def checkpoint_to_take(
    run: Path, asked: str | os.PathLike[str] | bool | None, own: Collection[Path] = ()
) -> Path | None:
    """Return the checkpoint from which a run goes on, or ``None`` to start afresh; all processes must call this.

    Args:
        run: Its ``output_dir``.
        asked: ``resume_from_checkpoint``: a checkpoint, or ``true`` for the newest complete one in ``run``, if any.
        own: Checkpoints in ``run`` that this run has written itself.

    Raises:
        FileNotFoundError: If the checkpoint that is named is not there.
        UsageError: If ``run`` holds checkpoints of another run and nothing was said about them.
        ValueError: If the one that is named, or every one, is not complete.
    """
    if asked is True or str(asked).lower() == "true":
        return newest_complete(run)
    if asked:
        check_complete(Path(asked))
        return Path(asked)
    if found := first_decides(lambda: [p for p in checkpoints(run) if p not in own and not is_unfinished(p)]):
        raise UsageError(
            f"output_dir {run} holds {found[-1].name} of an earlier run: set resume_from_checkpoint=true to go on from "
            "it, or another output_dir"
        )
    return None


class Resumption(TrainerCallback):
    """Checks that a run goes on by the model, the engine and the optimizer that wrote its checkpoint.

    Args:
        trainer: The Trainer, whose ``create_optimizer`` calls :meth:`note`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._checkpoint: Path | None = None
        self._class: str | None = None
        self._built: Optimizer | None = None

    def begin(self, checkpoint: Path | None) -> None:
        """Check a checkpoint, if any, before it is loaded.

        Raises:
            ValueError: If it is of another model, or the engine of the run does not go on from it.
        """
        self._checkpoint, self._class, self._built = checkpoint, None, None
        if checkpoint is None:
            return
        trainer = self._trainer
        check_same_model(checkpoint, trainer.accelerator.unwrap_model(trainer.model))
        if (obstacle := _obstacle(checkpoint, trainer)) is not None:
            raise ValueError(
                f"this run does not go on from {checkpoint}, which {obstacle}: train on as it was begun, or begin a "
                "run with its weights in another output_dir (init_from, or from_pretrained; `accelerate merge-weights` "
                "makes a file of FSDP's shards)"
            )
        try:
            facts = read_manifest(checkpoint)
        except FileNotFoundError:  # another Trainer wrote it
            return
        self._class = facts.get("optimizer")

    def note(self, optimizer: Optimizer) -> None:
        """Remember the optimizer that was built, which the engine has to run.

        Raises:
            ValueError: If the state in the checkpoint is that of another one.
        """
        built: Optimizer = innermost(optimizer)
        self._built, self._options = built, _options(built)
        name = type(built).__name__
        if self._class not in (None, name):
            raise ValueError(
                f"the optimizer of {self._checkpoint} is {self._class} and that of this run {name}: set optim to that "
                "of the checkpoint"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **kwargs: Any
    ) -> None:
        """Check which optimizer runs, and say what of its options is the checkpoint's."""
        if self._built is None:  # by a subclass's own create_optimizer
            check_decay(self._trainer.args)
            self.note(optimizer)
        assert self._built is not None
        check_optimizer(optimizer, self._built)
        checkpoint, self._checkpoint, self._class = self._checkpoint, None, None
        if checkpoint and is_first() and (different := _differences(self._options, _options(self._built))):
            logger.warning("these options come from %s, not from this run: %s", checkpoint, listed(different, 8))


def _obstacle(checkpoint: Path, trainer: Any) -> str | None:
    """Return why the engine of a run cannot go on from a checkpoint as it was begun; ``None`` if it can."""
    there, here = engine_of(checkpoint), "one process or DDP"
    if trainer.is_deepspeed_enabled:
        here = "DeepSpeed"
    elif trainer.is_fsdp_enabled:
        here = "FSDP"
    if there != here:
        return f"is of {there} where this run is of {here}"
    stem = Path(OPTIMIZER_NAME).stem
    states = (OPTIMIZER_NAME, f"{stem}.bin", f"{stem}_0", "global_step*")
    if not any(any(checkpoint.glob(name)) for name in states):
        return "holds no state of an optimizer (save_only_model=true)"
    if here == "FSDP":
        kind = "SHARDED_STATE_DICT" if (checkpoint / FSDP_SHARDS).is_dir() else "FULL_STATE_DICT"
        same = kind in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
        return None if same else f"needs fsdp_state_dict_type={kind} in the accelerate config"
    if here == "DeepSpeed":
        stage, count = trainer.accelerator.state.deepspeed_plugin.zero_stage, trainer.args.world_size
        is_stage_3 = any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))
        parts = len(list(checkpoint.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
        if is_stage_3 != (stage == 3) or (parts > 0) != (stage > 0):
            return f"is of another stage of ZeRO than {stage}"
        if parts not in (0, count):
            return f"is of {parts} processes, and this run has {count}"
    return None


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of an optimizer, the rate without its schedule among them."""
    return [
        {"initial_lr": group["lr"]}
        | {
            key: list(value) if isinstance(value, tuple) else value  # which FSDP loads as a list
            for key, value in group.items()
            if key not in _NOT_OPTIONS and not isinstance(value, torch.Tensor)
        }
        for group in optimizer.param_groups
    ]


def _differences(built: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> list[str]:
    """Return the options that a checkpoint changed, as ``weight_decay=0.01 (here 0.1)``, each once."""
    found: set[str] = set()
    for here, there in zip(built, loaded, strict=False):
        for key in here.keys() & there.keys():
            if str(here[key]) != str(there[key]):
                name = "learning_rate" if key == "initial_lr" else key
                found.add(f"{name}={there[key]} (here {here[key]})")
    return sorted(found)


def engine_of(checkpoint: Path) -> str:
    """Return which engine wrote a checkpoint: ``"DeepSpeed"``, ``"FSDP"``, or ``"one process or DDP"``."""
    if any(checkpoint.glob("global_step*")):
        return "DeepSpeed"
    return "FSDP" if any(checkpoint.glob(f"{FSDP_MODEL}*")) else "one process or DDP"


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights in a checkpoint by name; none if they lie where only DeepSpeed finds them."""
    shapes: dict[str, tuple[int, ...]] = {}
    files, shards = list(checkpoint.glob("model*.safetensors")), checkpoint / FSDP_SHARDS
    if not files and shards.is_dir():
        for name, facts in FileSystemReader(shards).read_metadata().state_dict_metadata.items():
            if isinstance(facts, TensorStorageMetadata):
                shapes[name.removeprefix("model.")] = tuple(facts.size)
    for path in files:
        with safe_open(path, framework="pt") as stored:
            shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    return shapes


def check_same_model(checkpoint: Path, model: nn.Module) -> None:
    """Fail with a ``ValueError`` that names a weight, if the weights in a checkpoint are not those of a model.

    Args:
        checkpoint: One whose weights lie in parts that only DeepSpeed reads is left to DeepSpeed.
        model: Unwrapped. Tied weights may be stored once, and what is not trained may be missing.
    """
    if not (stored := stored_shapes(checkpoint)):
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {id(parameters[name]) for name in stored if name in parameters}  # tied ones are stored under one name
    wrong = [
        f"{name} has shape {shape} there and {tuple(full_shape(parameters[name]))} here"
        for name, shape in stored.items()
        if name in parameters and shape != tuple(full_shape(parameters[name]))
    ]
    known = {*model.state_dict(), *parameters}
    wrong += [f"{name} is there and not here" for name in stored if name not in known]
    wrong += [
        f"{name} is not there"
        for name, parameter in parameters.items()
        if parameter.requires_grad and id(parameter) not in found
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint {checkpoint} is not of the {type(model).__name__} of this run: {listed(wrong)}"
        )
