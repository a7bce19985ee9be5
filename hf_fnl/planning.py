r"""The cost of a training before it is started: parameters, operations of a step, memory of a process by engine.

A step of the model runs on the ``meta`` device, where tensors have shapes and no values, in the course that it would
take on a GPU: attention by a kernel that keeps no weights, logits at a share of the labels where the model skips the
others. Counted are the operations of products of matrices and convolutions (two for each multiplication and addition,
by torch's ``FlopCounterMode``) and the bytes ``A`` of what autograd keeps. With ``P`` trainable parameters, of which
``L`` are in the largest layer and ``R`` in none, ``n`` processes, and ``w`` bytes of a number in the dtype of the
computation, 4 or 2, a process holds

========= =========== ============ ================ ================================
engine    weights     gradients    optimizer        buffers
========= =========== ============ ================ ================================
ddp       ``4 P``     ``4 P``      ``8 P``          ``4 P``, if ``n > 1``, as buckets
fsdp2     ``4 P / n`` ``4 P / n``  ``8 P / n``      ``2 w (R + 2 L)``
zero1     ``w P``     ``w P``      ``12 P / n``     ``w max(R, L)``
zero2     ``w P``     ``w P / n``  ``12 P / n``     ``w max(R, L)``
zero3     ``w P / n`` ``w P / n``  ``12 P / n``     ``w (R + 2 L)``
========= =========== ============ ================ ================================

beside ``A``. Weights that are not trained count among the weights only; under bf16 DDP has ``2 P`` more, the copies of
autocast, which also keeps norms in fp32, not counted here. The optimizer is LAMB, FLAMBe or AdamW: two moments in fp32,
and DeepSpeed's own fp32 weights. FSDP2 gathers a layer, the next one and what lies in none, and has as much of
gradients until they are divided. With activation checkpointing ``A`` is the inputs of the layers, what is kept outside
of them, and one layer, and the backward pass repeats the forward pass of the layers. What PyTorch itself takes and
fragments of its allocator come on top.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_fnl.models as models
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.surgery_loading import read_config, saved_class
from hf_fnl.surgery import factorize_, restore_
from hf_fnl.surgery.config import FactorizationConfig
from hf_fnl.surgery.record import QUANT_METHOD, method_of
from hf_fnl.utils.folders import check_model

ENGINES = ("ddp", "zero1", "zero2", "fsdp2", "zero3")
BYTES = {"fp32": 4, "bf16": 2}
GIB = 2**30

# Sizes that the configurations of these models on the Hub have; what is not named is the default of their family.
_SIDE = {
    f"{side}_{size}": number
    for side in ("encoder", "decoder")
    for size, number in (("layers", 6), ("attention_heads", 8), ("ffn_dim", 2048))
}
PRESETS: dict[str, tuple[str, dict[str, int]]] = {
    "bert-base": ("FactorizedBertForPreTraining", {}),
    "bert-large": (
        "FactorizedBertForPreTraining",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
    "gpt2": ("FactorizedGPT2LMHeadModel", {}),
    "gpt2-medium": ("FactorizedGPT2LMHeadModel", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("FactorizedGPT2LMHeadModel", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("FactorizedGPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "marian": ("FactorizedMarianMTModel", {"vocab_size": 58101, "d_model": 512, **_SIDE}),
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of a training.

    Args:
        processes: One for each GPU.
        batch_size: Sequences of a process in one forward pass.
        sequence_length: Tokens of a sequence.
        dtype: ``"fp32"``, or ``"bf16"``: autocast under DDP and FSDP2, a model in bf16 under ZeRO.
        checkpointing: Compute activations of a layer again in the backward pass.
        labelled_share: Share of the positions that are predicted, where a model computes logits at those only.

    Raises:
        ValueError: If the dtype is unknown.
    """

    processes: int = 1
    batch_size: int = 8
    sequence_length: int = 128
    dtype: str = "bf16"
    checkpointing: bool = False
    labelled_share: float = 0.15

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a step of a process, whatever the engine: what it computes and keeps.

    Args:
        parameters: Trainable elements, tied ones once.
        frozen: The others.
        largest_layer: Those of the largest layer.
        outside: Those in no layer.
        forward: Operations of a forward pass; a fused loss computes its gradients in it.
        backward: Operations of a backward pass, with what checkpointing computes again.
        activations: Bytes that autograd keeps for the backward pass, parameters excluded.
    """

    parameters: int
    frozen: int
    largest_layer: int
    outside: int
    forward: int
    backward: int
    activations: int


def meta_model(source: str, *, ratio: float | None = None, dense: bool = False, **ranks: int | None) -> PreTrainedModel:
    """Build a model on ``meta``; no weight is downloaded or read.

    Args:
        source: A name in :data:`PRESETS`, a model's folder, its ``config.json``, or an id on the Hub, ``USER/MODEL``.
        ratio: Share of all parameters that stay when linear layers are factorized, as ``hf-fnl factorize`` does it.
        dense: Leave out the ranks that the configuration has.
        **ranks: Ranks as our configurations take them; ``None`` leaves what the configuration says.

    Raises:
        FileNotFoundError: If ``source`` is none of these.
        ValueError: If the configuration names no known class, the class cannot take the ranks, or both ``ratio`` and
            ranks are given.
    """
    given = {name: rank for name, rank in ranks.items() if rank is not None}
    if ratio is not None and given:
        raise ValueError(f"ratio chooses ranks itself: leave out ratio, or {', '.join(given)}")
    model_class, config = _class_and_config(source)
    record = config.__dict__.pop("quantization_config", None)  # how surgery changed the model
    if given:
        model_class, config = _with_ranks(model_class, config, given)
    elif dense and issubclass(model_class, FactorizedPreTrainedModel):
        config = type(config).from_dense(config, **dict.fromkeys(config.rank_options()))
    with torch.device("meta"):
        model = model_class(config)
        if record is not None and method_of(record) == QUANT_METHOD and not dense:
            restore_(model, record)
    if ratio is not None:
        factorize_(model, FactorizationConfig(ratio=ratio))
    return model


def _class_and_config(source: str) -> tuple[Any, Any]:
    if source in PRESETS:
        name, sizes = PRESETS[source]
        model_class = getattr(models, name)
        return model_class, model_class.config_class(**sizes)
    path = Path(source).expanduser()
    if not path.is_file():
        try:
            check_model(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; by name there are {', '.join(PRESETS)}") from error
    config = read_config(path if path.exists() else source, local_files_only=path.exists())
    return saved_class(source, config), config


def _with_ranks(model_class: Any, config: Any, ranks: dict[str, int]) -> tuple[Any, Any]:
    """The factorized class of a model and its configuration with these ranks."""
    ours: list[Any] = [cls for cls in vars(models).values() if isinstance(cls, type)]
    ours = [cls for cls in ours if issubclass(cls, FactorizedPreTrainedModel) and hasattr(cls, "dense_class")]
    ours = [cls for cls in ours if model_class in (cls, cls.dense_class)]
    if not ours:
        raise ValueError(f"{', '.join(ranks)}: {model_class.__name__} has no factorized class; use ratio instead")
    config_class: Any = ours[0].config_class
    if unknown := ranks.keys() - set(config_class.rank_options()):
        raise ValueError(f"{config_class.__name__} has no {', '.join(sorted(unknown))}")
    return ours[0], config_class.from_dense(config, **ranks)


def cost_of(model: PreTrainedModel, setup: Setup) -> Cost:
    """Run a step of a model on ``meta``, and count.

    Args:
        model: On ``meta``; reads ``input_ids`` or ``pixel_values``. It is in the dtype of ``setup`` afterwards.
        setup: Batch and precision.

    Raises:
        ValueError: If the model reads something else, cannot be run without values, or has no layers to compute again,
            or the sequence is longer than its positions.
    """
    inputs = _inputs(model, setup)
    model.to(torch.float32 if setup.dtype == "fp32" else torch.bfloat16).train()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if setup.checkpointing and not layers:
        raise ValueError(f"checkpointing computes layers again, and a {type(model).__name__} has none that can be")
    sizes = [_trainable(layer) for layer in layers]
    parameters = _trainable(model)
    try:
        kept, forward, backward = _step(model, inputs, setup)
    except Exception as error:  # whatever a model says that wants other inputs, or values
        name = type(model).__name__
        raise ValueError(f"a {name} cannot take a step in {setup.dtype} without values: {error}") from error
    computed, again, activations = forward.get_total_flops(), 0, kept.total
    if setup.checkpointing:
        again = _flops_of_layers(forward, model, layers)
        activations += sum(kept.inputs) + max(kept.layers) - sum(kept.layers)
    return Cost(
        parameters=parameters,
        frozen=sum(parameter.numel() for parameter in model.parameters()) - parameters,
        largest_layer=max(sizes, default=0),
        outside=parameters - sum(sizes),
        forward=computed,
        backward=backward.get_total_flops() + again,
        activations=activations,
    )


def _step(
    model: PreTrainedModel, inputs: dict[str, Tensor], setup: Setup
) -> tuple[Kept, FlopCounterMode, FlopCounterMode]:
    """What autograd keeps in a step, and the operations of its two passes."""
    with OnGPU(setup.labelled_share):
        with kept_by(model) as kept:
            model(**inputs)
        # Counting operations hooks into all modules, beside which no loss goes around the vocabulary's logits.
        with flop_counter() as forward:
            loss = _loss(model(**inputs))
        with flop_counter() as backward:
            loss.backward()
    return kept, forward, backward


def memory_of(cost: Cost, setup: Setup, engine: str) -> dict[str, int]:
    """Bytes of a process at its peak, in the backward pass, under one of :data:`ENGINES`, and their total.

    By the table of this module.
    """
    P, n, w = cost.parameters, setup.processes, BYTES[setup.dtype]
    held = P + cost.frozen
    gathered, bucket = w * (cost.outside + 2 * cost.largest_layer), w * max(cost.outside, cost.largest_layer)
    copies = w * held if setup.dtype == "bf16" else 0
    weights, gradients, optimizer, buffers = {
        "ddp": (4 * held + copies, 4 * P, 8 * P, 4 * P if n > 1 else 0),
        "fsdp2": (4 * held // n, 4 * P // n, 8 * P // n, 2 * gathered),
        "zero1": (w * held, w * P, 12 * P // n, bucket),
        "zero2": (w * held, w * P // n, 12 * P // n, bucket),
        "zero3": (w * held // n, w * P // n, 12 * P // n, gathered),
    }[engine]
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    parts |= {"activations": cost.activations, "buffers": buffers}
    return parts | {"total": sum(parts.values())}


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of operations; by itself it passes over products that are added in place."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop})


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _inputs(model: PreTrainedModel, setup: Setup) -> dict[str, Tensor]:
    batch, config, taken = setup.batch_size, model.config, inspect.signature(model.forward).parameters
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224  # a network of convolutions takes any
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, getattr(config, "num_channels", 3), height, width)
        dtype = torch.float32 if setup.dtype == "fp32" else torch.bfloat16
        return {"pixel_values": torch.empty(shape, dtype=dtype, device="meta")}
    if model.main_input_name != "input_ids":
        raise ValueError(f"plan reads models of text and images, and a {type(model).__name__} {model.main_input_name}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < setup.sequence_length:
        raise ValueError(f"sequence_length must be at most {positions} for this model, got {setup.sequence_length}")
    ids = torch.empty(batch, setup.sequence_length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if "labels" in taken and model.get_output_embeddings() is not None:
        inputs["labels"] = ids
    elif config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "next_sentence_label" in taken:
        inputs["next_sentence_label"] = ids[:, 0]
    return inputs


def _loss(output: Any) -> Tensor:
    """The loss, or where there are no labels a sum whose gradient takes the same course."""
    return output.loss if output.get("loss") is not None else output[0].float().sum()


def _flops_of_layers(counter: FlopCounterMode, model: nn.Module, layers: list[nn.Module]) -> int:
    names = {f"{type(model).__name__}.{name}" for name, module in model.named_modules() if module in layers}
    return sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name in names)


@dataclass
class Kept:
    """Bytes that autograd keeps in a forward pass, every storage once and no parameter; see :func:`kept_by`.

    Args:
        total: All bytes so far.
        layers: Those that each layer added.
        inputs: Those of the hidden states that enter each layer.
    """

    total: int = 0
    layers: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)


@contextmanager
def kept_by(model: nn.Module) -> Iterator[Kept]:
    """Count what autograd keeps while a model runs, on any device."""
    kept = Kept()
    storages: dict[int, Tensor] = {_storage(parameter): parameter for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in storages:
            storages[_storage(tensor)] = tensor  # kept alive, so that no other storage gets its number
            kept.total += tensor.untyped_storage().nbytes()
        return tensor

    def begin_layer(layer: nn.Module, args: tuple[Any, ...]) -> None:
        kept.inputs.append(args[0].nbytes)
        kept.layers.append(-kept.total)

    def end_layer(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept.layers[-1] += kept.total

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                stack.enter_context(module.register_forward_pre_hook(begin_layer))
                stack.enter_context(module.register_forward_hook(end_layer))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        yield kept


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class OnGPU(TorchFunctionMode):
    """Lets tensors without values take the course that they would take on a GPU.

    Args:
        labelled_share: Share of the elements that a Boolean index selects, whose number is not known.
    """

    def __init__(self, labelled_share: float) -> None:
        super().__init__()
        self.labelled_share = labelled_share

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what depends on the device or on values."""
        kwargs = kwargs or {}
        if func is Tensor.__bool__:
            return False  # some versions of Transformers ask a random number whether to drop a layer
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype is torch.bool:
            rows = args[0].flatten(0, args[1].ndim - 1)
            count = max(1, round(self.labelled_share * len(rows)))
            return rows.index_select(0, torch.empty(count, dtype=torch.long, device=rows.device))
        return func(*args, **kwargs)


def _dropout(inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(inputs, p, True)[0] if training and p > 0 else inputs  # keeps a byte an element


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    heads, length = query.shape[-3:-1]
    # Queries that share a key are one longer head here, which takes and keeps as much; there are no values to be wrong.
    grouped = query.unflatten(-3, (key.shape[-3], -1)).flatten(-3, -2)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    rate, causal = options.get("dropout_p", 0.0), options.get("is_causal", False)
    output = kernel(grouped, key, value, None, True, rate, causal)[0]
    return output.transpose(1, 2).reshape(len(query), length, heads, -1).transpose(1, 2)
