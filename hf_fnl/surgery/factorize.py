"""Surgery: layers of any model become products of factors, in place."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_fnl.layers import Factorized, FactorizedLinear, FactorizedMatrix, TensorizedConv2d
from hf_fnl.math.factors import kept_energy
from hf_fnl.math.truncation import Moments, linear_energies
from hf_fnl.surgery.calibration import Calibration, Request, for_each
from hf_fnl.surgery.config import LAYER_KINDS, FactorizationConfig
from hf_fnl.surgery.ranks import Candidate, UnreachableShare, choose_ranks
from hf_fnl.surgery.record import QUANT_METHOD, layer_record, models_near
from hf_fnl.surgery.select import (
    Target,
    by_reason,
    empty_successor,
    layer_options,
    listed,
    select,
    split,
    successor_of,
)
from hf_fnl.surgery.swap import check_not_quantized, check_present, share_factors_, swap_and_record_, unwrapped


@dataclass(frozen=True)
class Replacement:
    """A weight that became a product.

    Args:
        name: Name of the layer.
        kind: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"tensor"``.
        shape: Shape of the matrix or tensor.
        rank: Columns of the factors.
        energy: Share of ``||W||_F^2`` that is kept, ``1 - ||W - U V^T||_F^2 / ||W||_F^2``; ``None`` where there was no
            weight to approximate.
        tied: Names of the other layers that hold the same weight.
        parameters_after: Parameters of the factors.
        record: What restores each of these layers in the place of the dense one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    energy: float | None
    tied: tuple[str, ...]
    parameters_after: int
    record: Mapping[str, Any] = field(repr=False)

    @property
    def parameters_before(self) -> int:
        """Parameters of the matrix or tensor."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        energy = "" if self.energy is None else f", energy {self.energy:.4f}"
        tied = f", tied to {', '.join(self.tied)}" if self.tied else ""
        return f"{self.name}: {self.kind} {' x '.join(map(str, self.shape))} at rank {self.rank}{energy}{tied}"


@dataclass(frozen=True)
class Factorization:
    """What surgery did to a model.

    Args:
        replacements: One for each weight that became a product.
        skipped: The reason why it stayed dense, for each weight that looks like a matrix and that the patterns of the
            configuration name: by the name of its layer, or its own where it is no layer's weight.
    """

    replacements: tuple[Replacement, ...]
    skipped: Mapping[str, str]

    @property
    def parameters_before(self) -> int:
        """Parameters of the weights that became products."""
        return sum(replacement.parameters_before for replacement in self.replacements)

    @property
    def parameters_after(self) -> int:
        """Parameters of these products."""
        return sum(replacement.parameters_after for replacement in self.replacements)

    def skipped_by_reason(self) -> dict[str, list[str]]:
        """The names in ``skipped``, by the reason."""
        return by_reason(self.skipped)

    def to_dict(self) -> dict[str, Any]:
        """What :func:`~hf_fnl.surgery.restore_` needs, ready for JSON."""
        layers = {name: dict(r.record) for r in self.replacements for name in (r.name, *r.tied)}
        return {"quant_method": QUANT_METHOD, "layers": layers}

    def __str__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        head = f"{len(self.replacements)} products, {before:,} -> {after:,} parameters ({after / before:.1%})"
        skipped = [f"{listed(names)}: dense, {reason}" for reason, names in self.skipped_by_reason().items()]
        return "\n  ".join([head, *map(str, self.replacements), *skipped])


@torch.no_grad()
def factorize_(
    model: nn.Module, config: FactorizationConfig, *, calibration: Calibration | None = None
) -> Factorization:
    """Replace layers of a model, in place, by products of factors.

    Layers that share a weight are factorized together, or not at all, and share their factors; the output embedding of
    a language model counts as an embedding. Layers that are factorized already stay as they are. Of a layer that cannot
    be factorized (a depthwise convolution, an embedding with ``max_norm``) the result tells why it was skipped. On the
    meta device only shapes change. If anything fails, the model is as it was.

    Only layers of the stock classes are taken, or of classes derived from them with the same forward pass. Hooks and
    attributes of a layer go over to the one that takes its place. One that holds more than that (a parametrization,
    hooks for its weight's gradient, a forward of its own) is not taken.

    A Transformers model saves and loads afterwards as before, wherever ``hf_fnl`` is imported: its configuration, which
    is then no other model's, lists the layers that are factorized when it is saved. This holds for each such model
    inside ``model`` and around it. For another model the caller keeps ``to_dict()`` of the result::

        record = factorize_(model, FactorizationConfig(ratio=0.5)).to_dict()
        safetensors.torch.save_model(model, "model.safetensors")
        ...
        restore_(new_model, record)
        safetensors.torch.load_model(new_model, "model.safetensors")

    Args:
        model: Any module; one that ``torch.compile`` returned compiles anew.
        config: Which layers, at which ranks.
        calibration: Inputs of the model, one batch or several: linear layers are then cut in the metric of what these
            data are in front of them, and ranks that depend on spectra are chosen in it.

    Returns:
        What was done.

    Raises:
        ValueError: If nothing matches, a layer that a pattern other than ``"*"`` names cannot be factorized or not at
            this rank, a rule cannot be met, a weight is not finite or, where values are needed, on the meta
            device, or the model is quantized by another method, divided among processes or offloaded.
    """
    model = unwrapped(model)
    check_not_quantized(model)
    check_present(model, "factorize_")
    if calibration is not None and config.init != "spectral":
        raise ValueError(f"calibration cuts trained weights and needs init='spectral', got {config.init!r}")
    near = models_near(model)
    targets, skipped = select(model, config, near)
    _check_values(targets, calibration is not None)
    candidates = _candidates(model, targets, config, calibration)
    others = sum(parameter.numel() for parameter in model.parameters()) - sum(c.dense for c in candidates)
    too_small = _below_rank(targets, candidates, config)
    candidates = [candidate for candidate in candidates if candidate.name not in too_small]
    try:
        ranks = choose_ranks(candidates, config, others=others)
    except UnreachableShare as error:
        hint = _other_kinds(model, config) if "stay dense" in str(error) else ""
        raise UnreachableShare(f"{error}{hint}") from error
    skipped |= too_small
    skipped |= {name: "its factors would hold as many parameters" for name, rank in ranks.items() if rank is None}
    chosen = [(target, rank) for target in targets if (rank := ranks.get(target.name)) is not None]
    successors = _cut(model, chosen, config, calibration)
    replacements = tuple(_replacement(target, successors[target.first], config.init) for target, _ in chosen)
    for dense, layer in successors.items():
        layer.train(dense.training)  # calibration made it while the model was in evaluation mode
        if calibration is not None and getattr(dense, "bias", None) is not None:
            dense.get_parameter("bias").copy_(layer.get_parameter("bias"))
    swap_and_record_(model, successors, near)
    return Factorization(replacements, skipped)


def _check_values(targets: Sequence[Target], calibrated: bool) -> None:
    for target in targets:
        weight = target.first.weight
        if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(f"the weight of {target.name} holds NaN or Inf")
        if weight.is_meta and calibrated:
            raise ValueError(f"{target.name} is on the meta device, where there is nothing to calibrate")


def _below_rank(
    targets: Sequence[Target], candidates: Sequence[Candidate], config: FactorizationConfig
) -> dict[str, str]:
    """Why what only ``"*"`` names stays dense where ``rank`` is above its largest; nothing if that holds for all."""
    named = dataclasses.replace(config, include=[pattern for pattern in config.include if pattern != "*"]).names
    reasons = {
        candidate.name: f"its rank can be at most {candidate.limit}"
        for target, candidate in zip(targets, candidates, strict=True)
        if (config.rank or 0) > candidate.limit and not any(map(named, target.layers))
    }
    return reasons if len(reasons) < len(candidates) else {}


def _other_kinds(model: nn.Module, config: FactorizationConfig) -> str:
    """A hint at kinds of layers with which the share of a configuration could be reached, if there are such."""
    total = sum(parameter.numel() for parameter in model.parameters())
    others = [] if config.classes else [kind for kind in LAYER_KINDS if kind not in config.kinds]
    for kinds in [*([kind] for kind in others), *([kind, *config.kinds] for kind in others)]:
        try:
            wider = dataclasses.replace(config, kinds=kinds)
            candidates = _candidates(model, select(model, wider)[0], wider)
        except ValueError:  # it has no such layers, or the configuration is of one kind only
            continue
        smallest = sum(c.cost(c.raised(0, config.multiple_of)) - c.dense for c in candidates)
        if total + smallest <= max(config.ratio or 0.0, config.budget or 0.0) * total:
            return f". Layers of kind {kinds[0]} stay dense as well: try kinds={','.join(kinds)}"
    return ""


def _candidates(
    model: nn.Module, targets: Sequence[Target], config: FactorizationConfig, calibration: Calibration | None = None
) -> list[Candidate]:
    spectra = functools.cache(lambda: _spectra(model, targets, calibration))
    candidates = []
    for target in targets:
        energies: Callable[[], Tensor] = functools.partial(lambda name: spectra()[name], target.name)
        limit, count, full = _sizes(target, config)
        candidates.append(Candidate(target.name, limit, count, target.first.weight.numel(), energies, full))
    return candidates


def _sizes(target: Target, config: FactorizationConfig) -> tuple[int, Callable[[int], int], int]:
    """The largest rank of a target, its parameters at a rank, and the rank that a rank scale of 1 stands for."""
    if target.is_tensor:
        kernel, scheme = target.first.weight.shape, target.scheme
        limit = TensorizedConv2d.largest_rank(kernel, scheme)
        return limit, lambda rank: TensorizedConv2d.parameter_count(kernel, rank, scheme), limit
    m, n = target.matrix.shape
    limit = sys.maxsize if config.overcomplete else min(m, n)
    full = m if isinstance(target.first, nn.Conv2d) and target.scheme == "spatial" else min(m, n)
    return limit, lambda rank: rank * (m + n + rank * config.deep), full


def _spectra(model: nn.Module, targets: Sequence[Target], calibration: Calibration | None) -> dict[str, Tensor]:
    """Squared singular values of every target, in the metric of its inputs where there are data."""
    by_name = {target.name: target for target in targets}
    found = {}

    def measure(name: str, moments: Moments | None) -> None:
        target = by_name[name]
        if target.matrix.is_meta:
            raise ValueError(f"{name} is on the meta device, where ranks cannot depend on spectra")
        found[name] = linear_energies(target.matrix, getattr(target.first, "bias", None), _metric(target, moments))

    requests = {name: _request(target) for name, target in by_name.items()}
    for_each(model, requests, measure, calibration, _ties(by_name.values()))
    return found


def _request(target: Target) -> Request:
    """The moments of its inputs, where linear layers alone see those of a weight."""
    are_linear = all(successor_of(type(layer)) is FactorizedLinear for layer in target.layers.values())
    return "inputs" if are_linear else None


def _metric(target: Target, moments: Moments | None) -> Moments | None:
    """The moments by which a weight is cut: about zero where layers share it, whose biases stay as they are."""
    return moments if moments is None or len(target.layers) == 1 else moments.about_zero()


def _ties(targets: Iterable[Target]) -> dict[str, list[str]]:
    return {target.name: list(target.layers)[1:] for target in targets}


def _cut(
    model: nn.Module,
    chosen: Sequence[tuple[Target, int]],
    config: FactorizationConfig,
    calibration: Calibration | None,
) -> dict[nn.Module, Factorized]:
    """The factorized layers by the dense ones in whose places they belong; the model stays as it is."""
    by_name = {target.name: (target, rank) for target, rank in chosen}
    successors: dict[nn.Module, Factorized] = {}

    def cut(name: str, moments: Moments | None) -> Mapping[nn.Module, Factorized]:
        target, rank = by_name[name]
        first, *others = target.layers.values()
        if moments is None:
            layer = split(model, first, rank, config)
        else:
            layer = FactorizedLinear.from_dense(target.first, rank, deep=config.deep, moments=_metric(target, moments))
        answering = {first: layer}
        for dense in others:
            partner = empty_successor(dense, rank, scheme=config.conv_scheme, **layer_options(config))
            answering[dense] = share_factors_(partner, layer)
            partner.set_bias_(getattr(dense, "bias", None))
        successors.update(answering)
        return answering

    requests = {name: _request(target) for name, (target, _) in by_name.items()}
    for_each(model, requests, cut, calibration, _ties(target for target, _ in chosen))
    return successors


def _replacement(target: Target, layer: Factorized, init: str) -> Replacement:
    name, *tied = target.layers
    energy = None if layer.factors()[0].is_meta or init != "spectral" else _kept_energy(target, layer)
    count = sum(factor.numel() for factor in layer.factors())
    return Replacement(name, layer.kind, layer.shape, layer.rank, energy, tuple(tied), count, layer_record(layer))


def _kept_energy(target: Target, layer: Factorized) -> float:
    if isinstance(layer, FactorizedMatrix):
        return kept_energy((target.matrix,), layer.U, layer.V)
    weight = target.first.weight.double()
    return float(1 - (weight - layer.dense_weight()).square().sum() / weight.square().sum())
