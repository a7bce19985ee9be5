"""Which layers of a model can be factorized, and which of them a configuration means."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_fnl.attention.adapters import attention_of
from hf_fnl.attention.selectors import ATTENTION_KINDS
from hf_fnl.layers import Factorized, HeadProjection, LinearPair
from hf_fnl.surgery.config import FactorizationConfig
from hf_fnl.surgery.heads import Attention, HeadTarget, Target
from hf_fnl.surgery.swap import is_read_by_its_parent, parameters_around, replacement_obstacle, weight_obstacle
from hf_fnl.surgery.targets import (
    FACTORIZED_CLASSES,
    LayerTarget,
    computes_otherwise,
    empty_layer,
    factorized_class,
    stock_class,
)
from hf_fnl.utils.suggest import did_you_mean, listed


def select(model: nn.Module, config: FactorizationConfig) -> tuple[list[Target], dict[str, str]]:
    """Return what a configuration means: layers that share a weight, and products of heads.

    Args:
        model: Any module.
        config: Which layers.

    Returns:
        The targets, and for all else that looks like a matrix and that the patterns name the reason why it stays dense:
        by the name of the layer or product, or of the parameter where that is no layer's weight.

    Raises:
        ValueError: If nothing is left, a pattern to include matches no module, or a layer that one other than ``"*"``
            names cannot be factorized.

    Warns:
        UserWarning: If a pattern to exclude matches no module and is like the name of one.
    """
    outputs = _output_embeddings(model)
    outside = parameters_around(model)
    held = weights(model)
    heads, skipped = _select_heads(model, config, held, outside)
    targets: list[Target] = [*heads]
    cut = {name for target in heads for name in target.layer_names}
    for weight, holders in held.items():
        if not cut.isdisjoint(holders):
            continue
        chosen = [n for n, layer in holders.items() if _is_meant(n, layer, config) and not _is_adapters(model, n)]
        if not chosen:
            skipped |= _not_chosen(model, weight, holders, config)
            continue
        is_output = any(layer in outputs or isinstance(layer, nn.Embedding) for layer in holders.values())
        reason = _obstacle(model, holders, config)
        if reason is None and weight in outside:
            reason = f"its weight is also {outside[weight]}, {_OUTSIDE}"
        is_named = any(map(config.matches_explicitly, chosen))
        if reason is None and is_output and "embedding" not in config.kinds and not is_named:
            reason = "it is the output embedding: add 'embedding' to kinds, or its name to include"
        if reason is None:
            targets.append(LayerTarget(first_names(holders), config.conv_scheme))
        elif named := [name for name in chosen if config.matches_explicitly(name)]:
            raise ValueError(f"{named[0]} cannot be factorized: {reason}")
        else:
            skipped[chosen[0]] = reason
    strangers = list(_unmatched(model, config))
    if not targets:
        raise ValueError(". ".join([_nothing_selected(model, config, skipped), *(text for _, text in strangers)]))
    for option, text in strangers:
        if option == "include":
            raise ValueError(text)
        if "did you mean" in text:  # else it may be meant for other models, as lm_head is
            warnings.warn(text, stacklevel=3)
    return targets, skipped


def _select_heads(
    model: nn.Module, config: FactorizationConfig, held: Mapping[Tensor, Holders], outside: Mapping[Tensor, str]
) -> tuple[list[HeadTarget], dict[str, str]]:
    """As :func:`select`, the products of heads."""
    targets: list[HeadTarget] = []
    skipped: dict[str, str] = {}
    for kind in (kind for kind in ATTENTION_KINDS if kind in config.kinds):
        for path, module in model.named_modules():
            name = f"{path}.{kind}" if path else kind
            if not any(map(config.matches, (path, name))) or any(map(config.excludes, (path, name))):
                continue
            found = _heads_of(path, module, kind, held, outside)
            if isinstance(found, HeadTarget) and any(map(config.excludes, found.layer_names)):
                continue
            if isinstance(found, HeadTarget) and found.layer_names not in {
                target.layer_names for target in targets if target.kind == kind
            }:
                targets.append(found)
            elif isinstance(found, str):
                if any(map(config.matches_explicitly, (path, name))):
                    raise ValueError(f"{name} cannot be cut: {found}")
                skipped[name] = found
    return targets, skipped


def _heads_of(
    path: str, module: nn.Module, kind: str, held: Mapping[Tensor, Holders], outside: Mapping[Tensor, str]
) -> HeadTarget | str | None:
    """The products of a kind of an attention, the reason why they cannot be cut, or ``None`` of another module."""
    if (known := attention_of(module)) is None:
        return None
    if known.kinds is None:
        return "the attention could not be run to see how it computes"
    if kind not in known.kinds:
        return f"the attention does not compute by {kind} products"
    if kind in known.projections.factorized_kinds():
        return "a projection is factorized already"
    if (attention := Attention.of(path, module, known.projections, kind)) is None:
        return _READ_BY_ITS_PARENT
    if not known.kinds[kind]:
        return f"{type(module).__name__} reads the weight of a layer of it and does not call that"
    names = []
    for layer in attention.layers([kind]):
        weight = layer.get_parameter("weight")
        first, *others = (name for name in held[weight])
        names.append(first.removesuffix(".weight"))
        if len(others) > 0:
            return f"its weight is also that of {others[0]}"
        if weight in outside:
            return f"its weight is also {outside[weight]}, {_OUTSIDE}"
        if computes_otherwise(type(layer)) and not isinstance(layer, HeadProjection):
            return f"{type(layer).__name__} does not compute what a stock layer does"
        if is_read_by_its_parent(layer):
            return _READ_BY_ITS_PARENT
        if reason := weight_obstacle(weight) or replacement_obstacle(layer):
            return reason
    target = HeadTarget(attention, kind, tuple(names))
    return "its heads are cut already" if target.is_cut else target


def _unmatched(model: nn.Module, config: FactorizationConfig) -> Iterator[tuple[str, str]]:
    """The option and a complaint for each pattern that no name of a module or a parameter matches."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parts = sorted({part for name in names for part in name.split(".")} - {""})
    for option in ("include", "exclude"):
        for pattern in getattr(config, option):
            if not any(fnmatchcase(name, pattern) for name in names):
                words = (word for word in re.split(r"[.*?]+", pattern) if not any(word in part for part in parts))
                hint = did_you_mean(next(words, ""), parts)
                yield option, f"{option}={pattern} matches nothing in {type(model).__name__}{hint}"


def _is_meant(name: str, layer: nn.Module | None, config: FactorizationConfig) -> bool:
    """Whether a layer is of a kind that is asked for; one of a class derived from the stock one has to be named."""
    ours = None if layer is None else factorized_class(type(layer))
    if ours is None or ours.kind not in config.kinds:
        return False
    return config.matches(name) if type(layer) in FACTORIZED_CLASSES else config.matches_explicitly(name)


def _not_chosen(model: nn.Module, weight: Tensor, holders: Holders, config: FactorizationConfig) -> dict[str, str]:
    """Return, by name, why a weight that looks like a matrix and that patterns name is of no class that is meant."""
    if sum(size > 1 for size in weight.shape) < 2 or weight.shape[0] == 1:
        return {}  # a vector, or a table that is added to every example
    name, layer = next(iter(holders.items()))
    attribute = "weight"
    if layer is None:
        path, parametrization, _ = name.partition(".parametrizations.")
        owner, _, attribute = name.rpartition(".")
        owner = path if parametrization else owner
        layer = model.get_submodule(owner)
        is_layer = stock_class(type(layer)) is not None
        if isinstance(layer, Factorized) or (is_layer and layer._parameters.get("weight", weight) is not weight):
            return {}
        if parametrization or attribute == "weight" or is_layer:
            name = owner
    reason = "it is an adapter's" if _is_adapters(model, name) else _why_not(layer, attribute)
    return {name: reason} if config.matches(name) else {}


def _is_adapters(model: nn.Module, name: str) -> bool:
    """Whether a module or parameter is in what PEFT added to a layer, and saves and merges by its names there."""
    parts = name.split(".")
    holders = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts)))
    return any(part in getattr(holder, "adapter_layer_names", ()) for part, holder in zip(parts, holders, strict=True))


def _why_not(layer: nn.Module, attribute: str) -> str:
    """Return why a weight is of no class that is meant; ``attribute`` is the name by which its layer holds it."""
    kind, stock = type(layer).__name__, stock_class(type(layer))
    if hasattr(layer, "parametrizations"):
        return "it is parametrized, as by torch.nn.utils.parametrizations"
    if stock is None:
        known = ", ".join(cls.__name__ for cls in FACTORIZED_CLASSES)
        return f"it belongs to a {kind}, and only weights of {known} are factorized"
    if isinstance(layer, HeadProjection):
        return "its heads are cut"
    if computes_otherwise(type(layer)):
        return f"{kind} does not compute what {stock.__name__} does"
    if attribute != "weight":
        return f"its weight is computed from {attribute}"
    if type(layer) is stock:
        return f"kind {FACTORIZED_CLASSES[stock].kind!r} was not asked for"
    if is_read_by_its_parent(layer):
        return _READ_BY_ITS_PARENT
    return f"it is a {kind}, which is not {stock.__name__} itself: name it in include"


Holders = dict[str, nn.Module | None]


def weights(model: nn.Module, ties: Mapping[str, str] | None = None) -> dict[Tensor, Holders]:
    """For each parameter of a model all that hold it, by name: the layers whose weight it is, and ``None`` for others.

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
        if attribute == "weight" and factorized_class(type(modules[holder])) is not None:
            weight[holder] = modules[holder]
        else:
            weight[name] = None
    return found


def first_names(weight: Holders) -> dict[str, nn.Module]:
    """The layers, each under the first of its names."""
    names: dict[nn.Module, str] = {}
    for name, layer in weight.items():
        if layer is not None:
            names.setdefault(layer, name)
    return {name: layer for layer, name in names.items()}


def _output_embeddings(model: nn.Module) -> set[nn.Module]:
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {output for output in (m.get_output_embeddings() for m in models) if output is not None}


_OUTSIDE = "outside of what is factorized: pass the model that holds both"
_READ_BY_ITS_PARENT = "torch's MultiheadAttention reads its weight and does not call it"


def _obstacle(model: nn.Module, holders: Holders, config: FactorizationConfig) -> str | None:
    """Return why layers that share a weight cannot be factorized together; ``None`` if they can."""
    for name, layer in holders.items():
        if layer is None:
            holder = type(model.get_submodule(name.rpartition(".")[0]))
            stock = stock_class(holder)
            why = "" if stock is None else f": {holder.__name__} does not compute what {stock.__name__} does"
            return f"its weight is also {name}, which is not the weight of a layer that can be factorized{why}"
        if not name:
            return "it is the model itself; use the from_dense of its factorized class"
        if config.excludes(name):
            return f"its weight is also that of {name}, which is excluded"
        if is_read_by_its_parent(layer):
            return _READ_BY_ITS_PARENT
        if name.rpartition(".")[2] == "_orig_mod":
            return "torch.compile wraps this layer alone: compile the model afterwards"
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, LinearPair):
            return "it is one of the two layers of a product: merge_ the model first"
        if hasattr(parent, "trainable_tokens_delta"):
            return "an adapter reads its weight and does not call it"
        if getattr(parent, "merged_adapters", None):
            return "an adapter is merged into it, and could not be taken out again: call unmerge_adapter() first"
        if reason := weight_obstacle(layer.get_parameter("weight")) or replacement_obstacle(layer):
            return reason
    if len({isinstance(layer, Conv1D) for layer in holders.values()}) > 1:
        return f"{' and '.join(holders)} share a weight that one of them holds transposed"
    try:
        # Costs nothing at rank 1, and the layer knows best what it can stand for.
        for layer in first_names(holders).values():
            empty_layer(layer, 1, scheme=config.conv_scheme)
    except ValueError as error:
        return str(error)
    return None


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of layers that stay dense, by the reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def _nothing_selected(model: nn.Module, config: FactorizationConfig, skipped: Mapping[str, str]) -> str:
    wanted = {"kinds": config.kinds, "include": config.include, "exclude": config.exclude}
    asked = ", ".join(f"{option}={listed(values)}" for option, values in wanted.items() if values)
    present: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, Factorized | HeadProjection):
            present["factorized already"].append(name)
        elif (ours := factorized_class(type(module))) is not None:
            present[f"{ours.kind} ({type(module).__name__})"].append(name)
    has = "; ".join(f"{kind}: {listed(names)}" for kind, names in present.items())
    reasons = {reason: names for reason, names in by_reason(skipped).items() if not reason.startswith("kind ")}
    passed_over = "".join(f". Passed over: {listed(names)} ({reason})" for reason, names in reasons.items())
    return f"no layer of {type(model).__name__} matches {asked}. It has {has or 'no layer to factorize'}{passed_over}"
