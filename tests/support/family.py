"""What the cases of every model family are made of: its sizes and ranks, and one case for each of its heads."""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel

import hf_fnl
from hf_fnl.attention.adapters import projections_of
from hf_fnl.layers import Factorized, HeadProjection
from hf_fnl.surgery.heads import Attention

Ranks = dict[str, Any]

# torch compiles its kernel, on a CPU with a C++ compiler and for AVX2 or better only.
_COMPILES_FLEX = shutil.which("g++") is not None and torch.backends.cpu.get_cpu_capability() != "DEFAULT"
needs_flex_attention = pytest.mark.skipif(
    not (_COMPILES_FLEX or torch.cuda.is_available()), reason="torch has no flex_attention here"
)

# What options and methods of activation checkpointing are called: from Transformers 5.23 on, and before.
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)


@dataclass(frozen=True)
class Family:
    """A family of models: how its classes are named, and small sizes.

    Args:
        name: As in ``BertModel``.
        sizes: Fields of the configuration.
        full: Sets of ranks at which nothing is lost, by name.
        low: Sets of lower ranks, by name.
        one_layer: Name of a layer, with ``{}`` for its number.
    """

    name: str
    sizes: Mapping[str, Any]
    full: Mapping[str, Ranks]
    low: Mapping[str, Ranks]
    one_layer: str

    @property
    def config(self) -> type[PreTrainedConfig]:
        return getattr(hf_fnl, f"Factorized{self.name}Config")

    @property
    def stock_config(self) -> type[PreTrainedConfig]:
        return getattr(transformers, f"{self.name}Config")


@dataclass(frozen=True)
class Head:
    """A head: its classes by the end of their names, what it is fed, and fields its configuration needs."""

    family: Family
    name: str
    auto: str | None
    inputs: Callable[[], dict[str, Tensor]]
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> type[PreTrainedModel]:
        return getattr(hf_fnl, f"Factorized{self.family.name}{self.name}")

    @property
    def stock(self) -> type[PreTrainedModel]:
        return getattr(transformers, f"{self.family.name}{self.name}")

    @property
    def stock_config(self) -> type[PreTrainedConfig]:
        return self.family.stock_config

    @property
    def auto_class(self) -> Any:
        """The Auto class that knows it; its own where none does."""
        return self.ours if self.auto is None else getattr(transformers, self.auto)

    def build(self, ranks: Ranks, *, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
        """Our model, drawn from seed 0, in evaluation mode."""
        config = self.family.config(**{**self.family.sizes, **self.config, **ranks, **fields})
        torch.manual_seed(0)
        return self.ours._from_config(config, attn_implementation=attention).eval()

    def build_stock(self, *, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
        """The stock model, drawn from seed 0, in evaluation mode."""
        torch.manual_seed(0)
        config = self.stock_config(**{**self.family.sizes, **self.config, **fields})
        return self.stock._from_config(config, attn_implementation=attention).eval()

    def build_source(self, **fields: Any) -> PreTrainedModel:
        """What ``from_dense`` makes it from."""
        return self.build_stock(**fields)

    def batch(self, seed: int = 1) -> dict[str, Tensor]:
        """Inputs with labels, the same at every call."""
        torch.manual_seed(seed)
        return self.inputs()


def token_ids(shape: tuple[int, ...], first: int, vocab_size: int) -> dict[str, Tensor]:
    """Random ids from ``first`` on, with the end of the first sequence masked."""
    ids = torch.randint(first, vocab_size, shape)
    mask = torch.ones_like(ids)
    mask[0, ..., 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def encoder_states(batch_size: int, width: int) -> dict[str, Tensor]:
    """States of an encoder, some of them masked."""
    mask = torch.ones(batch_size, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return {"encoder_hidden_states": torch.randn(batch_size, 6, width), "encoder_attention_mask": mask}


def run(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """Every tensor that the model returns; a cache is left out."""
    with torch.no_grad():
        outputs = model(**batch, **options)
    return {key: value for key, value in outputs.items() if key not in ("cache", "past_key_values")}


def run_double(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    """As :func:`run`, by a copy of the model in float64, in which equal models differ by much less than a tolerance.

    A loss that a model computes in float32 nevertheless is returned in float64.
    """
    return _double(run(copy.deepcopy(model).double(), _double(batch), **options))


def _double(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, values)


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss by parameter name; zero where there is none."""
    model.zero_grad()
    loss.backward()
    zero = torch.zeros(())
    return {n: (zero.expand_as(p) if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The loss of a batch, and its gradients by parameter name."""
    loss = model(**batch, **options).loss
    return {"loss": loss.detach(), **gradients(model, loss)}


def add(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of several results, name by name."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def random_vectors_(model: PreTrainedModel) -> PreTrainedModel:
    """Biases and norms that are not what they start as, so that losing one shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    return model


def factorized_layers(model: torch.nn.Module) -> dict[str, Factorized]:
    """The layers that hold a product of their own, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}


def attentions(model: torch.nn.Module) -> dict[str, Attention]:
    """The attentions of a model, by name."""
    found = {}
    for name, module in model.named_modules():
        if (projections := projections_of(module)) is not None:
            found[name] = Attention.of(name, module, projections, "ov")
    return {name: attention for name, attention in found.items() if attention is not None}


def ranks_of(attention: Attention | None) -> dict[str, int | None]:
    """The ranks of its products; ``None`` where its heads are those of the dense layers."""
    ranks: dict[str, int | None] = {"qk": None, "ov": None}
    for kind, side in (("qk", 0), ("ov", 3)):
        if attention is not None and isinstance(layer := attention.spans[side].layer, HeadProjection):
            rank = attention.rank(side)
            ranks[kind] = rank if rank < layer.dense_width else None
    return ranks


@contextmanager
def no_decompositions() -> Iterator[None]:
    """Every decomposition fails."""
    names = ("svd", "svdvals", "eigh", "eig", "eigvalsh", "qr", "cholesky")
    with mock.patch.multiple(torch.linalg, **dict.fromkeys(names, mock.Mock(side_effect=AssertionError("decomposed")))):
        yield
