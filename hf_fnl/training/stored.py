"""The weights in a checkpoint of Transformers, accelerate or DeepSpeed, by the files that are there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_fnl.layers.partitioned import full_shape
from hf_fnl.utils.suggest import listed

FSDP_MODEL = "pytorch_model_fsdp"
FSDP_SHARDS = f"{FSDP_MODEL}_0"

_PREFIX = "model."


def engine_of(checkpoint: Path) -> str:
    """Return which engine wrote a checkpoint: ``"DeepSpeed"``, ``"FSDP"``, or ``"one process or DDP"``."""
    if any(checkpoint.glob("global_step*")):
        return "DeepSpeed"
    return "FSDP" if any(checkpoint.glob(f"{FSDP_MODEL}*")) else "one process or DDP"


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the safetensors files of a model, if any, as ``from_pretrained`` finds them."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [checkpoint / name for name in sorted(set(names))]
    return [path for path in [checkpoint / SAFE_WEIGHTS_NAME] if path.is_file()]


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights in a checkpoint by name; none if they lie where only DeepSpeed finds them."""
    shapes: dict[str, tuple[int, ...]] = {}
    files, shards = weight_files(checkpoint), checkpoint / FSDP_SHARDS
    if not files and shards.is_dir():
        for name, facts in FileSystemReader(shards).read_metadata().state_dict_metadata.items():
            if isinstance(facts, TensorStorageMetadata):
                shapes[name.removeprefix(_PREFIX)] = tuple(facts.size)
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
        options = _different_options(checkpoint, model)
        raise ValueError(
            f"the checkpoint {checkpoint} is not of the {type(model).__name__} of this run: {listed(wrong)}"
            + (f"; there {listed(options)}" if options else "")
        )


def _different_options(checkpoint: Path, model: nn.Module) -> list[str]:
    """Numbers in the configuration of a checkpoint that a model has otherwise, such as its ranks."""
    path, config = checkpoint / CONFIG_NAME, getattr(model, "config", None)
    if config is None or not path.is_file():
        return []
    there, here = json.loads(path.read_text(encoding="utf-8")), config.to_dict()
    keys: Iterable[str] = (key for key in there | here if type(there.get(key, here.get(key))) is int)
    return [f"{key}={there.get(key)} (here {here.get(key)})" for key in keys if there.get(key) != here.get(key)]
