"""The mean of the weights of several checkpoints of one run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from hf_fnl.layers.partitioned import full_shape, is_partitioned
from hf_fnl.training.checkpoints import checkpoints
from hf_fnl.training.stored import stored_weights
from hf_fnl.utils.processes import is_first


def newest_checkpoints(folder: str | os.PathLike[str], count: int) -> list[Path]:
    """The last ``count`` checkpoints that a Trainer wrote into ``folder``, oldest first.

    Raises:
        ValueError: If ``count`` is below 1 or there are fewer.
    """
    if count < 1:
        raise ValueError(f"the number of checkpoints to average must be at least 1, got {count}")
    ordered = checkpoints(Path(folder))
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
        folders: Checkpoints of one model, from one run, as Transformers writes them or accelerate under FSDP2.

    Returns:
        A state dict in the dtypes of the checkpoints, summed in float64. Tensors that are not floating point must be
        equal everywhere.

    Raises:
        FileNotFoundError: If a folder holds no such weights.
        ValueError: If there are no folders, a file cannot be read, or names, shapes or whole numbers differ.
    """
    if not folders:
        raise ValueError("no checkpoints to average")
    first = stored_weights(Path(folders[0]))
    sums = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in first.items()}
    for folder in folders[1:]:
        weights = stored_weights(Path(folder))
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
        model: Unwrapped. Where FSDP2 or ZeRO-3 shards it, all processes must call this.
        folders: Its checkpoints.

    Raises:
        ValueError: As :func:`average_checkpoints`, or if the checkpoints hold a weight that the model lacks or has in
            another shape.
    """
    mean, parameters = average_checkpoints(folders), dict(model.named_parameters(remove_duplicate=False))
    # Tied weights and constant ones are not in a checkpoint, so some are missing.
    if unexpected := sorted(mean.keys() - {*model.state_dict(), *parameters}):
        raise ValueError(f"the checkpoints hold weights that the model lacks: {', '.join(unexpected)}")
    for name, parameter in parameters.items():
        if name in mean and mean[name].shape != full_shape(parameter):
            raise ValueError(
                f"{name} has shape {tuple(mean[name].shape)} in the checkpoints and {tuple(full_shape(parameter))} in "
                "the model"
            )
    if any(map(is_partitioned, parameters.values())):
        from deepspeed import zero

        named = {name: parameter for name, parameter in parameters.items() if name in mean}
        with zero.GatheredParameters(list(named.values()), modifier_rank=0):
            if is_first():
                for name, parameter in named.items():
                    parameter.copy_(mean[name])
        return
    set_model_state_dict(model, dict(mean), options=StateDictOptions(full_state_dict=True, strict=False))


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
