"""Workarounds for other packages, each with the reason, the versions and what ends it.

``full_parameters``: Under DeepSpeed's ZeRO-3, Transformers (5.17 to 5.24) makes every model inside of
``deepspeed.zero.Init``, which divides each layer as soon as its constructor returns. A layer that is then replaced by
one with factors is gone before it can be cut, and files are read into parameters that are not there. There is no option
for it. Ends when ``from_pretrained`` can leave the division to ``deepspeed.initialize``, which divides what is whole.

What is done for engines and checkpoints stands below, with the reason at each function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.integrations import deepspeed

if TYPE_CHECKING:
    from accelerate import Accelerator


_CAUSAL_BY_ANOTHER_NAME = {
    "BertGenerationDecoder",
    "BertLMHeadModel",
    "CTRLLMHeadModel",
    "GPT2LMHeadModel",
    "OpenAIGPTLMHeadModel",
    "ReformerModelWithLMHead",
}


@contextmanager
def full_parameters() -> Iterator[None]:
    """Let Transformers make and load models whole in here; DeepSpeed divides them when it starts."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


# --- engines and checkpoints


def check_shapes(model: nn.Module, before: Mapping[str, torch.Size]) -> None:
    """Refuse a model that has other shapes after loading than before.

    Transformers 5.17 to 5.22 takes whatever shapes a file has where a quantization method is at work, and does not say
    so, whether sizes may differ or not. Ends when 5.23 is the lowest.

    Args:
        model: With the weights of a checkpoint.
        before: The shapes that its configuration gives it, by name.

    Raises:
        ValueError: If one differs.
    """
    for name, tensor in model.state_dict().items():
        if tensor.shape != before.get(name, tensor.shape):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the checkpoint and {tuple(before[name])} in the model; "
                "ignore_mismatched_sizes draws it anew with Transformers from 5.23 on"
            )


def forget_old_names_(model: nn.Module) -> None:
    """Have weights saved under the names that the model gives them.

    Transformers 5.17 to 5.24 renames weights of old checkpoints (``LayerNorm.gamma`` of bert-base-uncased) in loading,
    and names them as before in saving. A Trainer that goes on from such a checkpoint of its own finds no weight of that
    name and trains on with what the model was made with, behind a warning of missing keys. Ends when the Trainer loads
    what it saved.
    """
    noted = getattr(model, "_weight_conversions", None)
    if noted is not None:
        old = [each.source_patterns for each in get_checkpoint_conversion_mapping("legacy")]
        model._weight_conversions = [each for each in noted if each.source_patterns not in old]  # type: ignore[assignment]


def name_causal_loss_(model: nn.Module) -> None:
    """Have the Trainer count those labels of a causal language model over which its loss is a mean.

    Transformers 5.17 to 5.24 tells by ``ForCausalLM`` in a class's name that labels are shifted, and counts the first
    of each sequence of other such models, too: losses of GPT-2 are too small by one in its length. Ends when the
    Trainer asks for the loss that the model computes.
    """
    for module in model.modules():
        names = {each.__name__ for each in type(module).__mro__}
        if names & _CAUSAL_BY_ANOTHER_NAME and getattr(module, "loss_type", None) is None:
            module.loss_type = "ForCausalLM"  # type: ignore[assignment]


def forget_evaluation(accelerator: Accelerator, model: nn.Module) -> None:
    """Let accelerate wrap a model for training by several processes that it has seen in an evaluation.

    accelerate 1.12 to 1.15 marks a model that was prepared for evaluation, and takes it for wrapped when it is prepared
    for training: every process then trains on its own. Ends when the mark tells the two apart.
    """
    if getattr(model, "_is_accelerate_prepared", False):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False  # type: ignore[assignment]


@contextmanager
def ties_in_one_unit(model: nn.Module, plugin: Any) -> Iterator[None]:
    """While accelerate shards a model by FSDP2: leave what shares parameters to the unit of the root.

    accelerate makes units of input and output embeddings, and of the classes in ``_no_split_modules``, and knows ties
    by ``weight`` alone, which factorized embeddings have not; torch 2.13 refuses a parameter in two units. Models that
    name no such classes get a unit for each of their repeated layers. A model that raises when it is asked for
    embeddings, as those of images do, is not asked. Ends when accelerate compares parameters.

    Args:
        model: Not wrapped yet.
        plugin: accelerate's FSDP plugin.
    """
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
