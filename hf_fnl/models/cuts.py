"""The cuts of a model of ours: where its configuration's ranks lie, and ranks that a rule chooses."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_fnl.attention.adapters import projections_of
from hf_fnl.attention.parts import parts_of
from hf_fnl.math.spectral import DRAWN_METHODS
from hf_fnl.models.configuration import FactorizedConfig, LayerRank
from hf_fnl.surgery.calibration_data import CalibrationData
from hf_fnl.surgery.config import RankRule
from hf_fnl.surgery.cut import candidates_of, parameters_beside
from hf_fnl.surgery.heads import Attention, HeadTarget, Target
from hf_fnl.surgery.ranks import choose_ranks
from hf_fnl.surgery.select import Holders, first_names, weights
from hf_fnl.surgery.targets import Cut, LayerTarget
from hf_fnl.utils.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names that a family's matrices have in its backbone, with ``*`` for the number of a layer.

    Args:
        attention: Attentions.
        ffn: Layers of a feed-forward block.
        embedding: Word embeddings; the output embedding goes with them.
        qkv: Layers that give queries, keys and values at once.
        end_of_branch: Layers that the stock model draws with the smaller standard deviation ``branch_std``.
    """

    attention: tuple[str, ...]
    ffn: tuple[str, ...]
    embedding: tuple[str, ...]
    qkv: tuple[str, ...] = ()
    end_of_branch: tuple[str, ...] = ()


def layer_in(patterns: Sequence[str], name: str) -> int | None:
    """The number of the layer in a name that one of some patterns matches, 0 without one; ``None`` if none does."""
    for pattern in patterns:
        if found := _compiled(pattern).fullmatch(name):
            return int(found[1]) if found.groups() else 0
    return None


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern.replace(".", r"\.").replace("*", r"(\d+)"))


def names_in_backbone(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by the names that they have in its backbone."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        yield name.removeprefix(prefix), module


def cuts_of(model: Any, config: FactorizedConfig) -> list[Cut]:
    """Return what a configuration says is cut in a model of ours without factors."""
    parts, held = parts_of(model), _holders(model)
    cuts = []
    for option, layers in _places(model).items():
        for number, names in layers.items():
            if (rank := config.rank_in_layer(option, number)) is None:
                continue
            for target in _targets(model, option, names, held):
                shared = {parts[name] for name in getattr(target, "layers", (target.module_name,))} - {None}
                part = shared.pop() if len(shared) == 1 else None
                kind = "embedding" if option == "embedding_rank" else target.kind
                cuts.append(Cut(target, rank, config.method_of(kind, part)))
    return cuts


def ranks_by_rule(
    model: Any, rule: RankRule, kinds: Sequence[str] | None, data: CalibrationData | None
) -> dict[str, LayerRank]:
    """Return the ranks that a rule chooses for kinds of matrices, as fields of the configuration.

    Raises:
        ValueError: If a kind is unknown, or the rule cannot be met.
    """
    places = _places(model)
    known = [option.removesuffix("_rank") for option in places]
    if kinds is None:
        kinds = [kind for kind in ("qk", "ov", "ffn") if kind in known]
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = sorted(set(kinds) - set(known))
    if unknown or not kinds:
        hint = did_you_mean(unknown[0], known) if unknown else ""
        raise ValueError(f"kinds must be any of {', '.join(known)}, got {', '.join(unknown) or 'none'}{hint}")
    held = _holders(model)
    groups: dict[str, list[Target]] = {}
    titles: dict[str, list[str]] = {}  # by kind, of its layers
    for kind in kinds:
        layers = places[f"{kind}_rank"]
        titles[kind] = [f"{kind} in layer {number}" if len(layers) > 1 else kind for number in layers]
        for title, names in zip(titles[kind], layers.values(), strict=True):
            groups[title] = _targets(model, f"{kind}_rank", names, held)
    targets = [target for group in groups.values() for target in group]
    candidates = candidates_of(model, groups, data)
    chosen = choose_ranks(candidates, rule, others=parameters_beside(model, targets))
    ranks: dict[str, LayerRank] = {}
    for kind in kinds:
        values = [chosen[title] for title in titles[kind]]
        ranks[f"{kind}_rank"] = values[0] if len(set(values)) == 1 else values
    return ranks


def check_methods(cuts: Sequence[Cut], given: str | Mapping[str, str], *, calibrated: bool) -> None:
    """Raise a ``ValueError`` that names the kind unless trained weights can be cut as ``factor_init`` says."""
    for kind, method in ((each.target.kind, each.init) for each in cuts):
        if method in DRAWN_METHODS:
            is_named = isinstance(given, str) or kind in {selector.partition(":")[0] for selector in given}
            because = "" if is_named else f" ({given} leaves {kind} out, and what it leaves out is 'default')"
            raise ValueError(
                f"factor_init={method!r} of {kind} draws factors in the place of trained weights{because}: set "
                f"factor_init of {kind} to 'spectral' or 'spectral_ones' to cut these"
            )
        if calibrated and method != "spectral":
            raise ValueError(
                f"calibration cuts trained weights and needs factor_init='spectral', got {method!r} of {kind}"
            )


def _places(model: Any) -> dict[str, dict[int, list[str]]]:
    """Return, for each rank of the configuration and number of a layer, the names of what has that rank."""
    by_option = {
        "qk_rank": model.names.attention,
        "ov_rank": model.names.attention,
        "qkv_rank": model.names.qkv,
        "ffn_rank": model.names.ffn,
        "embedding_rank": model.names.embedding,
    }
    names = {module: name for name, module in model.named_modules()}
    output = model.get_output_embeddings()
    found: dict[str, dict[int, list[str]]] = {option: {} for option in model.config.rank_options()}
    in_backbone = list(names_in_backbone(model))
    for option, layers in found.items():
        for name, module in in_backbone:
            number = layer_in(by_option[option], name)
            if number is None and option == "embedding_rank" and module is output:
                number = 0
            if number is not None:
                layers.setdefault(model.layer_number(name, number), []).append(names[module])
    return {option: dict(sorted(layers.items())) for option, layers in found.items()}


def _holders(model: Any) -> dict[str, Holders]:
    """Return, for each layer's name, all that hold its weight."""
    held = weights(model, model.all_tied_weights_keys)
    return {name: holders for holders in held.values() for name in holders}


def _targets(model: Any, option: str, names: Sequence[str], held: Mapping[str, Holders]) -> list[Target]:
    """Return what modules of some names are to surgery; layers that share a weight are one."""
    targets: list[Target] = []
    for name in names:
        if option in ("qk_rank", "ov_rank"):
            module, kind = model.get_submodule(name), option.removesuffix("_rank")
            projections = projections_of(module)
            attention = None if projections is None else Attention.of(name, module, projections, kind)
            if attention is None:
                raise ValueError(f"{name} is no attention whose heads can be cut")
            targets.append(HeadTarget(attention, kind, ()))
        elif name in held and not any(name in t.layers for t in targets if isinstance(t, LayerTarget)):
            targets.append(LayerTarget(first_names(held[name])))
    return targets
