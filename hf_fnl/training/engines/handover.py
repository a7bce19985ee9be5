"""Models that an engine takes over and gives back: FSDP2 and DeepSpeed's ZeRO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def ties_in_one_unit(model: nn.Module, plugin: Any) -> Iterator[None]:
    """While accelerate shards a model by FSDP2: leave what shares parameters to the unit of the whole model.

    accelerate makes units of input and output embeddings, and of the classes in ``_no_split_modules``; torch refuses a
    parameter in two units. That of the whole model keeps its parameters gathered from the forward to the backward pass,
    as accelerate does with a tied embedding that it knows as one. Models that name no such classes get a unit for each
    of their repeated layers. One that raises when it is asked for embeddings, as models of images do, is not asked.

    Args:
        model: Unwrapped.
        plugin: accelerate's FSDP plugin; ``None`` where there is none, and nothing is done.
    """
    if plugin is None:
        yield
        return
    tied = _tied_modules(model)
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = list(getattr(model, "_no_split_modules", None) or _repeated(model))
    holding = {type(module).__name__ for module in model.modules() if tied & set(module.modules())}
    plugin.transformer_cls_names_to_wrap = [n for n in plugin.transformer_cls_names_to_wrap if n not in holding]
    getters = ("get_input_embeddings", "get_output_embeddings") if tied or _lacks_embeddings(model) else ()
    for getter in getters:
        setattr(model, getter, lambda: None)
    try:
        yield
    finally:
        for getter in getters:
            delattr(model, getter)


def _repeated(model: nn.Module) -> list[str]:
    """Names of the classes of layers that are in a list of a model."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return sorted({type(layer).__name__ for layers in lists for layer in layers})


def _lacks_embeddings(model: nn.Module) -> bool:
    try:
        getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return True
    return False


def _tied_modules(model: nn.Module) -> set[nn.Module]:
    """Modules with a parameter of their own that another module has too."""
    owned = [(module, p) for module in model.modules() for p in module.parameters(recurse=False)]
    counts = Counter(parameter for _, parameter in owned)
    return {module for module, parameter in owned if counts[parameter] > 1}


def shard_for_evaluation(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Shard a model by FSDP2 as for training. accelerate wants an optimizer with it, so it gets one that is dropped."""
    sharded, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    accelerator._optimizers.clear()
    return sharded


def reshard_(model: nn.Module) -> None:
    """Let go of what FSDP2 gathered of a model in a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def forget_evaluation(accelerator: Accelerator, model: nn.Module) -> None:
    """Let accelerate wrap a model for training by several processes that it has seen in an evaluation.

    It would take the model for wrapped already, and every process would train on its own.
    """
    if getattr(model, "_is_accelerate_prepared", False):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False  # type: ignore[assignment]


def let_go(trainer: Any) -> bool:
    """End what FSDP2 or DeepSpeed does for a Trainer, when it has saved its model.

    Returns:
        Whether one of them held the model, which can then not be trained by another Trainer: load the saved one.
    """
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return False
    trainer.accelerator.wait_for_everyone()  # until the first process has written
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
        AcceleratorState._reset_state()  # or accelerate refuses the plugin of the next Trainer
    trainer.accelerator.free_memory()
    return True


def whole_parameters(model: nn.Module, names: Iterable[str]) -> AbstractContextManager[Mapping[str, Tensor]]:
    """Parameters of a model by name, for reading, whole also where they are sharded.

    All processes must ask for the same ones, a few at a time: they are in memory until the end of the block.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return _gathered_by_deepspeed(parameters)
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()}
    return nullcontext(whole)


@contextmanager
def _gathered_by_deepspeed(parameters: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    from deepspeed import zero

    with torch.no_grad(), zero.GatheredParameters(list(parameters.values())):
        yield parameters
