"""Which layers of a model can be factorized, and which of them a configuration means."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_fnl.config import TENSOR_SCHEMES, FactorizationConfig
from hf_fnl.layers import Factorized, FactorizedConv2d, FactorizedEmbedding, FactorizedLinear, TensorizedConv2d
from hf_fnl.layers.conv import kernel_matrix
from hf_fnl.layers.linear import dense_weight

Successor = type[FactorizedLinear] | type[FactorizedEmbedding] | type[FactorizedConv2d] | type[TensorizedConv2d]

SUCCESSORS: dict[type[nn.Module], Successor] = {
    nn.Linear: FactorizedLinear,
    Conv1D: FactorizedLinear,
    nn.Embedding: FactorizedEmbedding,
    nn.Conv2d: FactorizedConv2d,
}


def successor_of(dense: type[nn.Module], scheme: str = "spatial") -> Successor | None:
    """The factorized class that takes the place of a dense one; ``scheme`` says how kernels are factorized."""
    ours = next((ours for stock, ours in SUCCESSORS.items() if issubclass(dense, stock)), None)
    return TensorizedConv2d if ours is FactorizedConv2d and scheme in TENSOR_SCHEMES else ours


def empty_successor(dense: nn.Module, rank: int, *, scheme: str = "spatial", **options: Any) -> Factorized:
    """The factorized layer in the place of a dense one, with parameters that are not set yet.

    Args:
        dense: The dense layer.
        rank: Of the product.
        scheme: How a kernel is factorized.
        **options: As the class of the layer takes them: ``init``, and except for tensors ``deep`` and
            ``overcomplete``.
    """
    ours: Any = successor_of(type(dense), scheme)
    return ours.empty_like(dense, rank, **_scheme_option(ours, scheme), **options)


def split(model: nn.Module, dense: nn.Module, rank: int, config: FactorizationConfig) -> Factorized:
    """The factorized layer in the place of a dense one, from its weight or, for ``init="default"``, freshly drawn.

    What is drawn is drawn as the model draws its own weights, where it is one of Transformers, and else as torch does.
    """
    ours: Any = successor_of(type(dense), config.conv_scheme)
    if config.init != "default":
        return ours.from_dense(dense, rank, **_scheme_option(ours, config.conv_scheme), **layer_options(config))
    layer = empty_successor(dense, rank, scheme=config.conv_scheme, **layer_options(config))
    if not layer.factors()[0].is_meta:
        layer.set_factors_(layer.fresh_factors(_draw_as(model, dense)))
    return layer


def layer_options(config: FactorizationConfig) -> dict[str, Any]:
    """What a configuration says to the layers that it makes."""
    return {"init": config.init} | {name: True for name in ("deep", "overcomplete") if getattr(config, name)}


def _draw_as(model: nn.Module, dense: nn.Module) -> Callable[[Tensor], object] | None:
    """Fills a weight as a Transformers model would that of ``dense``."""
    if not isinstance(model, PreTrainedModel):
        return None

    def draw(weight: Tensor) -> None:
        layer = copy.copy(dense)
        layer._parameters = {"weight": nn.Parameter(weight), "bias": None}
        model._init_weights(layer)

    return draw


def _scheme_option(ours: Successor, scheme: str) -> dict[str, str]:
    return {"scheme": scheme} if ours.kind in ("conv", "tensor") else {}


@dataclass(frozen=True)
class Target:
    """Layers that hold one weight and are factorized together.

    Args:
        layers: The layers by their first names, in the order of the model.
        scheme: How a kernel becomes a matrix.
    """

    layers: Mapping[str, nn.Module]
    scheme: str

    @property
    def name(self) -> str:
        """Name of the first layer."""
        return next(iter(self.layers))

    @property
    def first(self) -> Any:
        """The first layer."""
        return next(iter(self.layers.values()))

    @property
    def is_tensor(self) -> bool:
        """Whether the weight is factorized as a tensor and not as a matrix."""
        return isinstance(self.first, nn.Conv2d) and self.scheme in TENSOR_SCHEMES

    @property
    def matrix(self) -> Tensor:
        """The weight as the matrix ``(m, n)`` that is factorized."""
        if isinstance(self.first, nn.Conv2d):
            return kernel_matrix(self.first.weight, self.scheme)
        return self.first.weight if isinstance(self.first, nn.Embedding) else dense_weight(self.first)


def select(model: nn.Module, config: FactorizationConfig) -> tuple[list[Target], dict[str, str]]:
    """The layers that a configuration means.

    Returns:
        The targets, and for each layer that only ``"*"`` names and that is passed over the reason.

    Raises:
        ValueError: If nothing is left, or a layer that a pattern other than ``"*"`` names cannot be factorized.
    """
    classes = tuple(config.classes) or tuple(stock for stock, ours in SUCCESSORS.items() if ours.kind in config.kinds)
    if unknown := [cls.__name__ for cls in classes if successor_of(cls) is None]:
        known = ", ".join(cls.__name__ for cls in SUCCESSORS)
        raise ValueError(f"classes must be {known} or subclasses of these, got {', '.join(unknown)}")
    by_name = replace(config, include=[pattern for pattern in config.include if pattern != "*"])
    outputs = _output_embeddings(model)
    wants_embeddings = any(issubclass(cls, nn.Embedding) for cls in classes)
    targets, skipped = [], {}
    for weight in weights(model):
        chosen = [name for name, layer in weight.items() if type(layer) in classes and config.names(name)]
        if not chosen:
            continue
        is_output = any(layer in outputs or isinstance(layer, nn.Embedding) for layer in weight.values())
        reason = _obstacle(weight, config)
        if reason is None and is_output and not wants_embeddings and not any(map(by_name.names, chosen)):
            reason = "it is the output embedding: add 'embedding' to kinds, or its name to include"
        if reason is None:
            targets.append(Target(_first_names(weight), config.conv_scheme))
        elif named := [name for name in chosen if by_name.names(name)]:
            raise ValueError(f"{named[0]} cannot be factorized: {reason}")
        else:
            skipped[chosen[0]] = reason
    if not targets:
        raise ValueError(_nothing_selected(model, config, skipped))
    return targets, skipped


Holders = dict[str, nn.Module | None]


def weights(model: nn.Module, ties: Mapping[str, str] | None = None) -> list[Holders]:
    """For each parameter of a model that is the weight of a dense layer, all that hold it, by name.

    What holds it otherwise than a dense layer its weight is listed by the name of the parameter, with ``None``.

    Args:
        model: Any model.
        ties: Names of parameters that are to be the same as others, by which they are counted.
    """
    ties = ties or {}
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[Tensor, Holders] = defaultdict(dict)
    for name, parameter in parameters.items():
        holder, _, attribute = name.rpartition(".")
        weight = found[parameters.get(ties.get(name, name), parameter)]
        if attribute == "weight" and successor_of(type(modules[holder])) is not None:
            weight[holder] = modules[holder]
        else:
            weight[name] = None
    return [weight for weight in found.values() if any(weight.values())]


def _first_names(weight: Holders) -> dict[str, nn.Module]:
    """The layers, each under the first of its names."""
    names: dict[nn.Module, str] = {}
    for name, layer in weight.items():
        if layer is not None:
            names.setdefault(layer, name)
    return {name: layer for layer, name in names.items()}


def _output_embeddings(model: nn.Module) -> set[nn.Module]:
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {output for output in (m.get_output_embeddings() for m in models) if output is not None}


def _obstacle(weight: Holders, config: FactorizationConfig) -> str | None:
    """Why layers that share a weight cannot be factorized together, if they cannot."""
    for name, layer in weight.items():
        if layer is None:
            return f"its weight is also {name}, which is not the weight of a layer that can be factorized"
        if not name:
            return "it is the model itself; use the from_dense of its factorized class"
        if not replace(config, include=("*",)).names(name):
            return f"its weight is also that of {name}, which is excluded"
        if not layer.get_parameter("weight").is_floating_point():
            return "its weight is not of floating point"
    if len({isinstance(layer, Conv1D) for layer in weight.values()}) > 1:
        return f"{' and '.join(weight)} share a weight that one of them holds transposed"
    try:
        # Costs nothing at rank 1, and the layer knows best what it can stand for.
        for layer in _first_names(weight).values():
            empty_successor(layer, 1, scheme=config.conv_scheme)
    except ValueError as error:
        return str(error)
    return None


def _nothing_selected(model: nn.Module, config: FactorizationConfig, skipped: Mapping[str, str]) -> str:
    wanted = {"classes": [cls.__name__ for cls in config.classes]} if config.classes else {"kinds": config.kinds}
    wanted |= {"include": config.include, "exclude": config.exclude}
    asked = ", ".join(f"{option}={_listed(values)}" for option, values in wanted.items() if values)
    present: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, Factorized):
            present["factorized already"].append(name)
        elif (ours := successor_of(type(module))) is not None:
            present[f"{ours.kind} ({type(module).__name__})"].append(name)
    has = "; ".join(f"{kind}: {_listed(names)}" for kind, names in present.items())
    passed_over = "".join(f". {name} was passed over: {reason}" for name, reason in skipped.items())
    return f"no layer of {type(model).__name__} matches {asked}. It has {has or 'no layer to factorize'}{passed_over}"


def _listed(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
