"""Models whose layers change in place: the form that they have in a checkpoint, and what wraps them."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from hf_fnl.layers import Factorized
from hf_fnl.models.base import adopt_modules_
from hf_fnl.models.surgery_loading import load


def match_checkpoint_(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give a model, in place, the layers that it has in a checkpoint, dense or factorized.

    What is trained stays what is trained. Nothing is decomposed. An optimizer that holds parameters of the model does
    not know of it.

    Args:
        model: A model of Transformers, in whatever form.
        folder: A checkpoint of the same model.

    Raises:
        ValueError: If the model is none of Transformers: its checkpoints do not tell which layers it has.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no model of Transformers, and its checkpoint does not tell whether its layers "
            "are factorized: bring it into that form yourself, and use DenseThenLowRank in a Trainer of Transformers"
        )
    options = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    there = load(folder, type(model), **options).to(model.device)
    if shapes(there.named_parameters()) == shapes(model.named_parameters()):
        return
    trained = _trained_weights(model)
    for path, module in there.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = "weight" if isinstance(module, Factorized) and name != "bias" else name
            parameter.requires_grad_(trained.get((path, weight), True))
            # Not where it lies in the file: results depend, in their last bits, on how memory is aligned.
            parameter.data = parameter.data.clone()
    adopt_modules_(model, there)


def rewrap_(model: nn.Module, options: DistributedDataParallelKwargs) -> None:
    """Let what wraps a model for several processes know its parameters as they are now.

    The wrapper stays the same object, as a training loop holds it. All processes must call this; they get the
    parameters of the first one.

    Args:
        model: The wrapped model; without a wrapper nothing is done.
        options: With which accelerate wraps models.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            DistributedDataParallel.__init__(
                wrapper,
                wrapper.module,
                device_ids=wrapper.device_ids,
                output_device=wrapper.output_device,
                **options.to_kwargs(),
            )
            options.register_comm_hook(wrapper)


def shapes(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    """Shapes of named parameters, by which the form of a model is known."""
    return {name: parameter.shape for name, parameter in parameters}


def _trained_weights(model: nn.Module) -> dict[tuple[str, str], bool]:
    """Whether parameters are trained, by the names of module and parameter; factors under that of their weight."""
    trained: dict[tuple[str, str], bool] = {}
    for path, module in model.named_modules():
        trained |= {(path, name): p.requires_grad for name, p in module.named_parameters(recurse=False)}
        if isinstance(module, Factorized):
            trained[path, "weight"] = module.factors()[0].requires_grad
    return trained
