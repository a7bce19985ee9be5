"""From a trained stock model to a factorized one: ranks from the spectra of its products, and their truncation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fnl.layers import Factorized, FactorizedEmbedding, FactorizedLinear
from hf_fnl.layers.linear import dense_weight
from hf_fnl.math.spectral import DRAWN_METHODS, spectral_init
from hf_fnl.math.truncation import (
    HeadMoments,
    Moments,
    Projection,
    linear_energies,
    ov_energies,
    qk_energies,
    truncate_linear,
    truncate_ov,
    truncate_qk,
)
from hf_fnl.models.attention import FactorizedAttention, Spans
from hf_fnl.surgery.calibration import Calibration, Heads, Request, for_each
from hf_fnl.surgery.config import LayerRank, RankRule
from hf_fnl.surgery.ranks import Candidate, choose_ranks
from hf_fnl.utils.suggest import listed

# For each option of a configuration, such as `ffn_rank`, and each layer the modules that share the rank.
Shared = Mapping[str, Sequence[Sequence[str]]]
Projections = Callable[[Any], Spans]


def ranks_by_rule(
    dense: nn.Module,
    shared: Shared,
    rule: RankRule,
    *,
    projections: Projections,
    num_heads: int,
    calibration: Calibration | None = None,
) -> dict[str, LayerRank]:
    """Ranks for a configuration, chosen by a rule from the products of a stock model.

    Args:
        dense: The stock model.
        shared: The modules whose products share a rank.
        rule: How ranks are chosen.
        projections: Gives the query, key, value and output of an attention of the model.
        num_heads: Heads of an attention.
        calibration: Data in whose metric spectra are taken, where the rule needs spectra.

    Returns:
        For each option of ``shared`` one rank, or a list with one for each layer where they differ.
    """

    @functools.cache
    def spectra() -> dict[tuple[str, str], Tensor]:
        return _spectra(dense, shared, projections, num_heads, calibration)

    candidates: dict[str, list[Candidate]] = {option: [] for option in shared}
    for option, layers in shared.items():
        for number, names in enumerate(layers):
            modules = [dense.get_submodule(name) for name in names]
            energies = functools.partial(_summed, spectra, option, names)
            name = option.removesuffix("_rank") + (f" in layer {number}" if len(layers) > 1 else "")
            candidates[option].append(_candidate(name, option, modules, projections, num_heads, energies))
    products = [candidate for layers in candidates.values() for candidate in layers]
    others = sum(parameter.numel() for parameter in dense.parameters()) - sum(product.dense for product in products)
    chosen = choose_ranks(products, rule, others=others)
    ranks = {option: [chosen[candidate.name] for candidate in layers] for option, layers in candidates.items()}
    return {option: values[0] if len(set(values)) == 1 else values for option, values in ranks.items()}


def _candidate(
    name: str,
    option: str,
    modules: Sequence[nn.Module],
    projections: Projections,
    num_heads: int,
    energies: Callable[[], Tensor],
) -> Candidate:
    if option in ("qk_rank", "ov_rank"):
        pairs = [projections(module)[:2] if option == "qk_rank" else projections(module)[2:] for module in modules]
        # The biases of queries, keys and values are as wide as the heads; that of the output is not.
        inner = [pair if option == "qk_rank" else pair[:1] for pair in pairs]
        dense = sum(side.weight.numel() for pair in pairs for side in pair)
        dense += sum(side.bias.numel() for sides in inner for side in sides if side.bias is not None)
        limit = projections(modules[0])[0].weight.shape[0] // num_heads
        return Candidate(name, limit, lambda rank: rank * dense // limit, dense, energies)
    shapes = [_matrix(module).shape for module in modules]
    limit = min(min(shape) for shape in shapes)
    unit = sum(m + n for m, n in shapes)
    return Candidate(name, limit, lambda rank: rank * unit, sum(m * n for m, n in shapes), energies)


def _summed(spectra: Callable[[], dict[tuple[str, str], Tensor]], option: str, names: Sequence[str]) -> Tensor:
    """Energies of products that share a rank, each as shares of its own total."""
    energies = [spectra()[option, name] for name in names]
    return torch.stack([e / e.sum().clamp(min=torch.finfo(e.dtype).tiny) for e in energies]).sum(0)


def _spectra(
    dense: nn.Module, shared: Shared, projections: Projections, num_heads: int, calibration: Calibration | None
) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}
    options: dict[str, list[str]] = {}
    for option, layers in shared.items():
        for name in (name for names in layers for name in names):
            options.setdefault(name, []).append(option)

    def measure(name: str, moments: Any) -> None:
        module = dense.get_submodule(name)
        if _cuts_heads(options[name]):
            query, key, value, output = head_projections(projections(module), num_heads)
            found["qk_rank", name] = qk_energies(query, key, moments)
            found["ov_rank", name] = ov_energies(value, output, moments)
        else:
            found[options[name][0], name] = linear_energies(_matrix(module), getattr(module, "bias", None), moments)

    requests: dict[str, Request] = {}
    for name, wanted in options.items():
        module = dense.get_submodule(name)
        if _cuts_heads(wanted):
            requests[name] = _heads(projections(module), num_heads)
        else:
            requests[name] = None if isinstance(module, nn.Embedding) else "inputs"
    for_each(dense, requests, measure, calibration)
    return found


def _cuts_heads(options: Sequence[str]) -> bool:
    return bool({"qk_rank", "ov_rank"} & set(options))


def _heads(projections: Spans, num_heads: int) -> Heads:
    query, key, _, output = projections
    return Heads(num_heads, num_heads, query, key, output.layer)


def _matrix(module: Any) -> Tensor:
    return module.weight if isinstance(module, nn.Embedding) else dense_weight(module)


def head_projections(projections: Spans, num_heads: int) -> tuple[Projection, Projection, Projection, Projection]:
    """Query, key, value and output of an attention, head by head."""
    output = projections[3]
    sides = []
    for projection in projections[:3]:
        bias = None if projection.bias is None else projection.bias.unflatten(0, (num_heads, -1))
        sides.append(Projection(projection.weight.unflatten(0, (num_heads, -1)).mT, bias))
    weight = output.weight.unflatten(1, (num_heads, -1)).transpose(0, 1)
    return sides[0], sides[1], sides[2], Projection(weight, output.bias)


@torch.no_grad()
def fill_(ours: PreTrainedModel, dense: nn.Module, calibration: Calibration | None = None) -> None:
    """Fill a factorized model from the stock model of the same sizes, in place.

    Args:
        ours: The factorized model; its modules have the stock model's names.
        dense: The stock model, which is left as it is.
        calibration: Truncates in the metric of what these data are in front of each layer, layer by layer in the order
            of execution; see :mod:`hf_fnl.surgery.calibration`. In the Frobenius norm unless given. An embedding, and
            the output matrix that is tied to it, always are.

    Raises:
        ValueError: If a tensor of one of the models has no counterpart in the other, ``ours`` ties what ``dense`` holds
            twice with other values, ``factor_init`` of the configuration draws factors, so that what was learned would
            be lost, or is not ``"spectral"`` where there is a calibration.
    """
    ours.tie_weights()  # which a construction that initializes nothing leaves out
    units = _units(ours)
    _check_methods(units, ours.config.factor_init, calibrated=calibration is not None)
    sources = _sources(ours, dense, units)
    for name, value in ours.state_dict().items():
        if name in sources:
            value.copy_(sources[name])
    trained = {name: p.requires_grad for name, p in dense.named_parameters(remove_duplicate=False)}
    of_a_subclass = []
    for name, parameter in ours.named_parameters():
        weight = name.rpartition(".")[0] + ".weight"  # what a factor stands for
        if name not in trained and weight not in trained:
            of_a_subclass.append(name)
            continue
        parameter.requires_grad_(trained[name] if name in trained else trained[weight])
        parameter._is_hf_initialized = True  # as of what is loaded: never drawn anew
    if of_a_subclass:
        ours.initialize_weights()
    requests = {name: _request(unit, dense.get_submodule(name)) for name, unit in units.items()}
    held: dict[str, Any] = {name: getattr(unit, "bias", None) for name, unit in units.items()}
    biases = {name: bias.clone() for name, bias in held.items() if bias is not None}

    def fill(name: str, moments: Any) -> nn.Module:
        unit = units[name]
        stock: Any = dense.get_submodule(name)
        if isinstance(unit, FactorizedAttention):
            _fill_attention_(unit, stock, moments)
        elif isinstance(unit, FactorizedEmbedding):
            unit.load_state_dict(FactorizedEmbedding.from_dense(stock, unit.rank, init=unit.init).state_dict())
        elif isinstance(unit, FactorizedLinear):
            _fill_linear_(unit, dense_weight(stock), biases.get(name), moments)
        return unit

    for_each(dense, requests, fill, calibration)


def _request(ours: nn.Module, dense: nn.Module) -> Request:
    if isinstance(ours, FactorizedAttention):
        return _heads(ours.projections(dense), ours.num_heads)
    return "inputs" if isinstance(ours, FactorizedLinear) else None


def _sources(ours: PreTrainedModel, dense: nn.Module, units: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a stock model that go over as they are, by their names in ours; all of both are accounted for."""
    theirs = dense.state_dict(keep_vars=True)
    state = ours.state_dict(keep_vars=True)
    copied = {
        name: theirs[name] for name, value in state.items() if name in theirs and theirs[name].shape == value.shape
    }
    truncated = {f"{name}.weight": module.factors()[0] for name, module in _factorized(ours)}
    cut = [module for module in units.values() if isinstance(module, FactorizedAttention)]
    by_heads = _names_of_projections(dense, [(m, dense.get_submodule(name)) for name, m in units.items() if m in cut])
    set_by_heads = _names_of_projections(ours, [(module, module) for module in cut])

    taken = {id(theirs[name]) for name in (*copied, *truncated, *by_heads) if name in theirs}
    if lost := [name for name, value in theirs.items() if id(value) not in taken]:
        shapes = {name: tuple(state[name].shape) for name in lost if name in state}
        but = f": its own has shape {shapes[lost[0]]}" if lost[0] in shapes else ""
        raise ValueError(f"a {type(ours).__name__} has no place for {listed(lost)} of the {type(dense).__name__}{but}")
    set_later = {f"{name}.{factor}" for name, module in _factorized(ours) for factor in ("U", "M", "V")} | set_by_heads
    layers = {name for name, _ in dense.named_modules() if name}  # what dense lacks is a subclass's own, and drawn
    missing = [name for name in state if name not in copied and name not in set_later]
    if missing := [name for name in missing if name.rpartition(".")[0] in layers]:
        raise ValueError(f"the {type(dense).__name__} lacks {listed(missing)}, which a {type(ours).__name__} has")
    first: dict[int, tuple[str, Tensor]] = {}
    held = {**{name: state[name] for name in copied}, **truncated}
    for name, value in held.items():
        if (source := copied.get(name, theirs.get(name))) is not None:
            other, same = first.setdefault(id(value), (name, source))
            if same is not source and not torch.equal(same, source):
                raise ValueError(
                    f"a {type(ours).__name__} holds {other} and {name} as one, which differ in the "
                    f"{type(dense).__name__}: set tie_word_embeddings=False in its configuration"
                )
    return copied


def _factorized(model: nn.Module) -> list[tuple[str, Factorized]]:
    modules = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in modules if isinstance(module, Factorized)]


def _names_of_projections(model: nn.Module, attentions: Iterable[tuple[FactorizedAttention, Any]]) -> set[str]:
    """Names of the weights and biases of attentions in a model, whose layers ours knows to find."""
    names = {module: name for name, module in model.named_modules()}
    layers = {span.layer for ours, attention in attentions for span in ours.projections(attention)}
    return {f"{names[layer]}.{tensor}" for layer in layers for tensor, _ in layer.named_parameters(recurse=False)}


def _units(ours: PreTrainedModel) -> dict[str, nn.Module]:
    """What is filled at once, by name: attentions and factorized layers, one of those that are tied.

    That one is the input embedding or else the first: Marian's first is a table that is never called.
    """
    units: dict[str, nn.Module] = {}
    embedding = ours.get_input_embeddings()
    filled = set(embedding.factors() if isinstance(embedding, Factorized) else ())
    for name, module in ours.named_modules():
        untied = isinstance(module, Factorized) and (module is embedding or module.U not in filled)
        if untied or isinstance(module, FactorizedAttention):
            units[name] = module
            filled.update(module.factors() if isinstance(module, Factorized) else ())
    return units


def _check_methods(units: Mapping[str, nn.Module], given: str | Mapping[str, str], *, calibrated: bool) -> None:
    """Raise a ``ValueError`` that names the kind unless trained weights can be cut as ``factor_init`` says."""
    methods: list[tuple[str, str]] = []
    for unit in units.values():
        if isinstance(unit, Factorized):
            methods.append((unit.kind, unit.init))
        elif isinstance(unit, FactorizedAttention):
            ranks = {"qk": unit.ranks.qk, "ov": unit.ranks.ov}
            methods += [(kind, unit.ranks.init[kind]) for kind, rank in ranks.items() if rank is not None]
    for kind, method in methods:
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


def _fill_linear_(ours: FactorizedLinear, weight: Tensor, bias: Tensor | None, moments: Moments | None) -> None:
    if moments is None:
        ours.set_factors_(spectral_init(weight, ours.rank, ours.init))
        return
    U, V, bias = truncate_linear(weight, bias, ours.rank, moments)
    ours.set_factors_((U, V))
    ours.set_bias_(bias)


def _fill_attention_(ours: FactorizedAttention, dense: nn.Module, moments: HeadMoments | None) -> None:
    theirs = ours.projections(dense)
    query, key, value, output = head_projections(theirs, ours.num_heads)
    width = query.weight.shape[-1]
    ranks, init = ours.ranks, ours.ranks.init
    if ranks.qk is not None and (ranks.qk < width or init["qk"] != "spectral"):
        query, key = truncate_qk(query, key, ranks.qk, moments, init["qk"])
    if ranks.ov is not None and (ranks.ov < width or init["ov"] != "spectral"):
        value, output = truncate_ov(value, output, ranks.ov, moments, init["ov"])
    *inner, outer = ours.projections(ours)
    for projection, side in zip(inner, (query, key, value), strict=True):
        projection.set_(side.weight.mT.flatten(0, 1), None if side.bias is None else side.bias.flatten())
    outer.set_(output.weight.transpose(0, 1).flatten(1), output.bias)
