"""The mean of the weights of several checkpoints of one run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_fnl.training.checkpoints.contents import WEIGHT, Held, aliases, held_weights, whole_copies
from hf_fnl.training.checkpoints.trainer import holds_parts


def newest_checkpoints(folder: str | os.PathLike[str], count: int) -> list[Path]:
    """The last ``count`` checkpoints that a Trainer wrote into ``folder``, oldest first.

    Raises:
        ValueError: If ``count`` is below 1 or there are fewer.
    """
    if count < 1:
        raise ValueError(f"the number of checkpoints to average must be at least 1, got {count}")
    found = {path: path.name.rpartition("-")[2] for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    ordered = sorted((path for path, step in found.items() if step.isdecimal()), key=lambda path: int(found[path]))
    if len(ordered) < count:
        raise ValueError(
            f"{count} checkpoints are to be averaged, but {folder} holds {len(ordered)}: average fewer, or keep more "
            "with save_strategy and save_total_limit"
        )
    return ordered[-count:]


def average_checkpoints(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Tensor]:
    """Average weights tensor by tensor, as fairseq does.

    Factors are averaged one by one, and the mean of factors is not the mean of their products: it stands for a model
    near the averaged ones only along one trajectory, where the factors of a product move little and together. Factors
    from different runs can differ by any invertible ``A`` in ``(U A)(V A^-T)^T``; merge such models before averaging.

    Args:
        folders: Checkpoints with safetensors weights, of one model, from one run.

    Returns:
        A state dict in the dtypes of the checkpoints, summed in float64. Tensors that are not floating point must be
        equal everywhere.

    Raises:
        FileNotFoundError: If a folder holds no safetensors weights.
        ValueError: If there are no folders, a file cannot be read, or names, shapes or whole numbers differ.
    """
    if not folders:
        raise ValueError("no checkpoints to average")
    first = _load_weights(Path(folders[0]))
    sums = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
    for folder in folders[1:]:
        weights = _load_weights(Path(folder))
        _check_alike(first, weights, folders[0], folder)
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                sums[name] += tensor
    floats = {name for name, tensor in first.items() if tensor.is_floating_point()}
    return {
        name: (total / len(folders)).to(first[name].dtype) if name in floats else total for name, total in sums.items()
    }


@torch.no_grad()
def load_average_(model: nn.Module, folders: Sequence[str | os.PathLike[str]]) -> None:
    """Replace the weights of ``model`` by the average of its checkpoints.

    Args:
        model: Unwrapped. Where FSDP2 or ZeRO-3 divides it, each process takes its part of the average.
        folders: Its checkpoints.

    Raises:
        ValueError: As :func:`average_checkpoints`, or if the checkpoints hold a weight that the model lacks or has in
            another shape.
    """
    mean, names = average_checkpoints(folders), aliases(model)
    # Tied weights and constant ones are not in a checkpoint, so some are missing.
    held = [each for each in (*held_weights(model), *whole_copies(model)) if mean.keys() & _names(each, names)]
    if unexpected := sorted(mean.keys() - {name for each in held for name in _names(each, names)}):
        raise ValueError(f"the checkpoints hold weights that the model lacks: {', '.join(unexpected)}")
    for each in held:
        (name, *_) = sorted(mean.keys() & _names(each, names))
        if mean[name].shape != each.shape:
            raise ValueError(
                f"{name} has shape {tuple(mean[name].shape)} in the checkpoints and {each.shape} in the model"
            )
        here = each.tensors[WEIGHT]
        here.copy_(mean[name].reshape(-1)[each.start : each.stop].view(here.shape))


def _names(held: Held, names: Mapping[str, Sequence[str]]) -> set[str]:
    """All names of a weight, of which a checkpoint has one."""
    return {held.name, *names.get(held.name, ())}


def _load_weights(folder: Path) -> dict[str, Tensor]:
    if holds_parts(folder):
        raise FileNotFoundError(
            f"{folder} holds its weights in parts: make whole ones of them with hf-fnl consolidate, or train with "
            "checkpoint_format=full"
        )
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    weights: dict[str, Tensor] = {}
    for file in (folder / name for name in sorted(names)):
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}")
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"cannot read {file}: {error}") from error
    return weights


def _check_alike(first: dict[str, Tensor], other: dict[str, Tensor], *folders: str | os.PathLike[str]) -> None:
    if different := sorted(first.keys() ^ other.keys()):
        raise ValueError(f"{different[0]} is in one of {folders[0]} and {folders[1]} only")
    for name, tensor in first.items():
        if tensor.shape != other[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in {folders[0]} and {tuple(other[name].shape)} in {folders[1]}"
            )
        if not tensor.is_floating_point() and not torch.equal(tensor, other[name]):
            raise ValueError(f"{name}, which is not floating point, differs between {folders[0]} and {folders[1]}")
