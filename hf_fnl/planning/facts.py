"""What a training step of a model holds and computes, seen by running it on tensors without values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, register_flop_formula
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_fnl.attention import find_products
from hf_fnl.optim.groups import parameter_groups
from hf_fnl.optim.units import Units
from hf_fnl.planning.setup import Setup

# torch counts the operation that writes a new tensor only; the formula that it hands out is prepared already.
register_flop_formula(torch.ops.aten.addmm_, get_raw=True)(addmm_flop)


@dataclass(frozen=True)
class FactorFacts:
    """A factor under decay.

    Args:
        name: Its parameter.
        rows: Rows of the factor of a head, ``m`` of ``(heads, m, rank)``.
        rank: Its rank.
        heads: Heads; 1 where there are none.
        unit: Elements of a piece that has to be whole somewhere: a head of a parameter that is stored head by head,
            otherwise a row.
        first: Where the first piece begins in the flattened parameter.
        count: Pieces.
    """

    name: str
    rows: int
    rank: int
    heads: int
    unit: int
    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model in a training step of one GPU, in numbers of elements, bytes and floating-point operations.

    Args:
        shapes: Trainable parameters, tied ones once.
        groups: Their names, by group of the optimizer.
        layers: Parameters of each layer that FSDP2 gathers by itself.
        uses: Names of parameters in the order in which modules read them in a forward pass, tied ones at every use.
        factors: Factors under Frobenius decay.
        buffer_bytes: Buffers, which DDP sends around.
        hidden_size: Width of the model.
        activations: Bytes that autograd keeps for the backward pass, parameters excluded.
        layer_activations: Bytes of these within each layer.
        layer_inputs: Bytes of the hidden states that enter each layer.
        forward_flops: Operations of a forward pass.
        backward_flops: Operations of a backward pass; a fused loss does some of them in the forward pass.
    """

    shapes: dict[str, tuple[int, ...]]
    groups: tuple[tuple[str, ...], ...]
    layers: tuple[tuple[str, ...], ...]
    uses: tuple[str, ...]
    factors: tuple[FactorFacts, ...]
    buffer_bytes: int
    hidden_size: int
    activations: int
    layer_activations: tuple[int, ...]
    layer_inputs: tuple[int, ...]
    forward_flops: int
    backward_flops: int

    @property
    def parameters(self) -> int:
        """Trainable elements."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def layer_flops_share(self) -> float:
        """Share of the forward pass that layers take, by their parameters: what checkpointing computes twice."""
        in_layers = sum(math.prod(self.shapes[name]) for layer in self.layers for name in layer)
        used = sum(math.prod(self.shapes[name]) for name in self.uses if len(self.shapes[name]) > 1)
        return min(1.0, in_layers / max(used, 1))


def facts_of(model: PreTrainedModel, setup: Setup) -> Facts:
    """Look at a model on ``meta``, and run a step of it on tensors that have shapes only.

    Args:
        model: A text model with a loss; it is not to be used afterwards.
        setup: Batch, precision and what is decayed.

    Raises:
        ValueError: If the model does not take ``input_ids`` and ``labels``, the sequence is longer than its positions,
            or it has no product of a kind to be decayed.
    """
    _check(model, setup)
    kinds = setup.frobenius_decay if setup.optimizer == "flambe" else ()
    products = find_products(model, kinds) if kinds else []
    groups = parameter_groups(model, weight_decay=0.01, products=products)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    uses = [names[id(p)] for module in model.modules() for p in module._parameters.values() if p is not None]
    return Facts(
        shapes=shapes,
        groups=tuple(tuple(name for name, _ in group["params"]) for group in groups),
        layers=tuple(tuple(names[id(p)] for p in layer.parameters()) for layer in layers),
        uses=tuple(name for name in uses if name in shapes),
        factors=tuple(_factors(products, model)),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        hidden_size=model.config.hidden_size,
        **_run(model, setup),
    )


def _check(model: PreTrainedModel, setup: Setup) -> None:
    if model.main_input_name != "input_ids":
        raise ValueError(f"plan reads text models, and a {type(model).__name__} reads {model.main_input_name}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and setup.sequence_length > positions:
        raise ValueError(f"sequence_length must be at most {positions} for this model, got {setup.sequence_length}")


def _factors(products: list, model: nn.Module) -> Iterator[FactorFacts]:
    for product in products:
        for part, factor in zip(product.parts, product.factors(model), strict=True):
            *heads, rows, rank = factor.shape
            units = Units(part, tuple(model.get_parameter(part.name).shape))
            yield FactorFacts(part.name, rows, rank, math.prod(heads), units.size, units.first, units.count)


def _run(model: PreTrainedModel, setup: Setup) -> dict[str, Any]:
    """Bytes that a forward pass keeps, and operations of both passes."""
    bf16 = setup.dtype == "bf16"
    if bf16 and setup.engine != "ddp":
        model.to(torch.bfloat16)
    kept = Kept(model)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and not setup.is_zero)
    with FakeTensorMode():
        give_storage(model)
        model.train()
        inputs = _inputs(model, setup)
        with autocast, OnGPU(setup.labelled_share), kept:
            model(**inputs)
        # Counting operations hooks into all modules, beside which no loss goes around the vocabulary's.
        with autocast, OnGPU(setup.labelled_share), FlopCounterMode(display=False) as forward:
            loss = model(**inputs).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return {
        "activations": kept.total,
        "layer_activations": tuple(kept.layers),
        "layer_inputs": tuple(kept.inputs),
        "forward_flops": forward.get_total_flops(),
        "backward_flops": backward.get_total_flops(),
    }


def _inputs(model: PreTrainedModel, setup: Setup) -> dict[str, Tensor]:
    ids = torch.empty(setup.batch_size, setup.sequence_length, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": ids}
    if "next_sentence_label" in inspect.signature(model.forward).parameters:
        inputs["next_sentence_label"] = ids[:, 0]
    return inputs


def give_storage(model: nn.Module) -> None:
    """Put parameters on the CPU, where autocast works; under a FakeTensorMode they take no memory. Ties stay."""
    made: dict[int, Any] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            held: dict[str, Any] = tensors
            held.update({name: moved(tensor) for name, tensor in held.items() if tensor is not None})


class Kept:
    """Counts the bytes that autograd keeps in a forward pass: every storage once, and no parameter.

    Args:
        model: Its layers are counted one by one as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[int] = []
        self.inputs: list[int] = []
        self._model = model
        self._storages: dict[int, Tensor] = {}
        self._hooks: Any = None
        self._handles: list[Any] = []

    @property
    def total(self) -> int:
        """Bytes kept so far."""
        parameters = {_storage(parameter) for parameter in self._model.parameters()}
        return sum(t.untyped_storage().nbytes() for key, t in self._storages.items() if key not in parameters)

    def __enter__(self) -> Kept:
        for module in self._model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                self._handles.append(module.register_forward_pre_hook(self._enter_layer))
                self._handles.append(module.register_forward_hook(self._leave_layer))
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._storages.setdefault(_storage(tensor), tensor)  # kept alive, so that no other storage gets its number
        return tensor

    def _enter_layer(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs.append(args[0].nbytes)
        self._before = self.total

    def _leave_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.layers.append(self.total - self._before)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class OnGPU(TorchFunctionMode):
    """Lets tensors without values take the course that they would take on a GPU.

    Attention is computed by a kernel that keeps no weights, dropout keeps a byte for each element, and autocast
    normalizes in fp32. Selecting the labelled positions, whose number is not known, selects a share of them.
    """

    def __init__(self, labelled_share: float) -> None:
        super().__init__()
        self.labelled_share = labelled_share

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what depends on the device or on values."""
        kwargs = kwargs or {}
        if func is Tensor.__bool__:
            return False  # some versions of Transformers ask a random number whether to drop a layer
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype is torch.bool:
            rows = args[0].flatten(0, args[1].ndim - 1)
            chosen = torch.empty(max(1, round(self.labelled_share * len(rows))), dtype=torch.long)
            return rows.index_select(0, chosen)
        return func(*args, **kwargs)


def _dropout(inputs: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(inputs, p, True)[0] if training and p > 0 else inputs


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    rate, causal = options.get("dropout_p", 0.0), options.get("is_causal", False)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, None, True, rate, causal)[0]


@contextmanager
def counted(model: nn.Module) -> Iterator[Kept]:
    """Count what autograd keeps while a real model runs, to compare with a plan."""
    kept = Kept(model)
    with kept:
        yield kept
