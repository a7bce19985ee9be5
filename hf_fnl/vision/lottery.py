"""Lottery tickets: a network is trained, pruned by magnitude and trained again, in rounds (Frankle & Carbin 2019)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_fnl.training.runs import checkpoint_to_resume
from hf_fnl.utils.files import write_json
from hf_fnl.utils.run_files import METRICS_FILE
from hf_fnl.vision.pruning import apply_masks_, choose_masks, finalize_, prunable_layers, sparsity


def train_in_rounds(
    model: nn.Module,
    make_trainer: Callable[[nn.Module, int], Trainer],
    keep: int,
    *,
    rounds: int = 1,
    rewind: bool = True,
) -> dict[str, dict[str, Any]]:
    """Train a network, prune the weights that ended smallest, and train the others, ``rounds`` times over.

    Each round keeps the same share ``(keep / weights)^(1 / rounds)`` of the weights that the one before it kept.
    ``rewind`` makes it iterative magnitude pruning (Frankle & Carbin 2019): what is kept goes back to its initial
    value before it is trained, so that the last training is that of the ticket. Without it training goes on from where
    it was: pruning with fine-tuning (Renda et al. 2020).

    The trainings, one more than rounds, are the phases of the run. In the output folder of its trainer each writes the
    model, with plain weights and exact zeros, its ``trainer_state.json`` and ``metrics.json``. A phase that has these
    is not run again, and one that was broken off goes on from its newest checkpoint: call this with a model of the same
    initial weights, and ``resume_from_checkpoint="true"`` in the arguments.

    Args:
        model: Before it is trained; holds the result afterwards.
        make_trainer: Gets the model and the number of a phase, from 1, and returns its trainer, with arguments of its
            own whose ``output_dir`` no other phase has.
        keep: How many weights stay in the end.
        rounds: How many times it is pruned.
        rewind: Whether the weights that stay start anew.

    Returns:
        For each phase, under ``phase-1`` and so on, the metrics of training and, where the trainer has an
        ``eval_dataset``, of evaluation, and the ``parameters`` that are left, see
        :func:`~hf_fnl.vision.pruning.sparsity`.

    Raises:
        ValueError: If ``keep`` is out of range, or an output folder holds an earlier run and nothing was said about it.
    """
    total = sum(layer.weight.numel() for layer in prunable_layers(model).values())
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    metrics = {"phase-1": _run_phase(make_trainer(model, 1))}
    for number in range(1, rounds + 1):
        remaining = round(total * (keep / total) ** (number / rounds))
        masks = choose_masks(model, remaining, method="magnitude")
        if rewind:
            model.load_state_dict(initial)
        apply_masks_(model, masks)
        metrics[f"phase-{number + 1}"] = _run_phase(make_trainer(model, number + 1))
    return metrics


def _run_phase(trainer: Trainer) -> dict[str, Any]:
    """Train the model of a trainer to the end, unless that has been done; its weights are plain afterwards."""
    folder, model = Path(trainer.args.output_dir), trainer.model
    metrics = _finished(folder, trainer.args)
    if metrics:
        finalize_(model)
        load_model(model, folder / SAFE_WEIGHTS_NAME)
        return metrics
    metrics = _train(trainer)
    finalize_(model)
    metrics |= {"parameters": sparsity(model)}
    trainer.save_state()
    trainer.save_model()
    if trainer.is_world_process_zero():
        write_json(folder / METRICS_FILE, metrics)  # last, for it says that the rest is there
    return metrics


def _train(trainer: Trainer) -> dict[str, Any]:
    metrics = trainer.train(resume_from_checkpoint=checkpoint_to_resume(trainer.args)).metrics
    return metrics if trainer.eval_dataset is None else metrics | trainer.evaluate()


def _finished(folder: Path, args: TrainingArguments) -> dict[str, Any]:
    """Return the metrics of a phase that was run to its end; empty if it was not."""
    resume, finished = args.resume_from_checkpoint, (folder / METRICS_FILE).is_file()
    if str(resume or "true").lower() != "true":
        raise ValueError(
            f"resume_from_checkpoint={resume} belongs to one phase of several; with true, each goes on from its own "
            "newest checkpoint"
        )
    if finished and not resume:
        raise ValueError(
            f"output_dir {folder} holds a finished phase of an earlier run: set resume_from_checkpoint=true to go on "
            "from it, or another output_dir"
        )
    return json.loads((folder / METRICS_FILE).read_text()) if finished else {}
