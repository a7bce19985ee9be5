"""Surgery: layers of any model become products of factors, in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_fnl.calibration import Calibration, Call, for_each
from hf_fnl.config import FactorizationConfig
from hf_fnl.functional import kept_energy
from hf_fnl.layers import Factorized, FactorizedLinear
from hf_fnl.ranks import Candidate, choose_ranks
from hf_fnl.surgery.select import Target, empty_successor, select, split, successor_of
from hf_fnl.surgery.swap import QUANT_METHOD, check_not_quantized, layer_record, share_factors_, swap_, unwrapped
from hf_fnl.truncation import linear_energies


@dataclass(frozen=True)
class Replacement:
    """A weight that became a product.

    Args:
        name: Name of the layer.
        kind: ``"linear"``, ``"embedding"`` or ``"conv"``.
        shape: Shape of the matrix.
        rank: Columns of the factors.
        energy: Share of ``||W||_F^2`` that is kept, ``1 - ||W - U V^T||_F^2 / ||W||_F^2``; ``None`` where there was no
            weight to approximate.
        tied: Names of the other layers that hold the same weight.
        record: What restores each of these layers in the place of the dense one.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    energy: float | None
    tied: tuple[str, ...]
    record: Mapping[str, Any] = field(repr=False)

    @property
    def parameters_before(self) -> int:
        """Parameters of the matrix, ``m n``."""
        return self.shape[0] * self.shape[1]

    @property
    def parameters_after(self) -> int:
        """Parameters of the factors, ``(m + n) rank``."""
        return sum(self.shape) * self.rank

    def __str__(self) -> str:
        energy = "" if self.energy is None else f", energy {self.energy:.4f}"
        tied = f", tied to {', '.join(self.tied)}" if self.tied else ""
        return f"{self.name}: {self.kind} {self.shape[0]} x {self.shape[1]} at rank {self.rank}{energy}{tied}"


@dataclass(frozen=True)
class Factorization:
    """What surgery did to a model.

    Args:
        replacements: One for each weight that became a product.
        skipped: Layers that were meant and stayed dense, with the reason.
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

    def to_dict(self) -> dict[str, Any]:
        """What :func:`~hf_fnl.surgery.restore_` needs, ready for JSON."""
        layers = {name: dict(r.record) for r in self.replacements for name in (r.name, *r.tied)}
        return {"quant_method": QUANT_METHOD, "layers": layers}

    def __str__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        head = f"{len(self.replacements)} products, {before:,} -> {after:,} parameters ({after / before:.1%})"
        skipped = [f"{name}: dense, {reason}" for name, reason in self.skipped.items()]
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

    A Transformers model saves and loads afterwards as before, wherever ``hf_fnl`` is imported: its configuration
    records the factorization. For another model the caller keeps ``to_dict()`` of the result::

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
        ValueError: If nothing matches, a layer that a pattern other than ``"*"`` names cannot be factorized, a rank is
            above a layer's, a rule cannot be met, a weight is not finite or, where values are needed, on the meta
            device, or the model is quantized by another method.
    """
    model = unwrapped(model)
    check_not_quantized(model)
    if calibration is not None and config.init != "spectral":
        raise ValueError(f"calibration cuts trained weights and needs init='spectral', got {config.init!r}")
    targets, skipped = select(model, config)
    _check_values(targets, calibration is not None)
    ranks = choose_ranks(_candidates(model, targets, calibration), config)
    skipped |= {name: "its factors would hold as many parameters" for name, rank in ranks.items() if rank is None}
    chosen = [(target, rank) for target in targets if (rank := ranks[target.name]) is not None]
    successors = _cut(model, chosen, config, calibration)
    replacements = tuple(_replacement(target, successors, config.init) for target, _ in chosen)
    for dense, layer in successors.items():
        layer.train(dense.training)  # calibration made it while the model was in evaluation mode
        if calibration is not None and getattr(dense, "bias", None) is not None:
            dense.get_parameter("bias").copy_(layer.get_parameter("bias"))
    swap_(model, successors)
    return Factorization(replacements, skipped)


def _check_values(targets: Sequence[Target], calibrated: bool) -> None:
    for target in targets:
        weight = target.first.weight
        if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all():
            raise ValueError(f"the weight of {target.name} holds NaN or Inf")
        if weight.is_meta and calibrated:
            raise ValueError(f"{target.name} is on the meta device, where there is nothing to calibrate")


def _candidates(model: nn.Module, targets: Sequence[Target], calibration: Calibration | None) -> list[Candidate]:
    spectra = functools.cache(lambda: _spectra(model, targets, calibration))
    candidates = []
    for target in targets:
        m, n = target.matrix.shape
        energies: Callable[[], Tensor] = functools.partial(lambda name: spectra()[name], target.name)
        candidates.append(Candidate(target.name, min(m, n), m + n, m * n, energies))
    return candidates


def _spectra(model: nn.Module, targets: Sequence[Target], calibration: Calibration | None) -> dict[str, Tensor]:
    """Squared singular values of every target, in the metric of its inputs where there are data."""
    by_name = {target.name: target for target in targets}
    found = {}

    def measure(name: str, call: Call | None) -> None:
        target = by_name[name]
        if target.matrix.is_meta:
            raise ValueError(f"{name} is on the meta device, where ranks cannot depend on spectra")
        moments = call.input_moments() if call is not None and _in_metric(target) else None
        found[name] = linear_energies(target.matrix, getattr(target.first, "bias", None), moments)

    for_each(model, by_name, measure, calibration)
    return found


def _in_metric(target: Target) -> bool:
    """Whether one linear layer alone sees the inputs of a weight."""
    return len(target.layers) == 1 and successor_of(type(target.first)) is FactorizedLinear


def _cut(
    model: nn.Module,
    chosen: Sequence[tuple[Target, int]],
    config: FactorizationConfig,
    calibration: Calibration | None,
) -> dict[nn.Module, Factorized]:
    """The factorized layers by the dense ones in whose places they belong; the model stays as it is."""
    by_name = {target.name: (target, rank) for target, rank in chosen}
    successors: dict[nn.Module, Factorized] = {}

    def cut(name: str, call: Call | None) -> nn.Module:
        target, rank = by_name[name]
        if call is not None and _in_metric(target):
            layer: Factorized = FactorizedLinear.from_dense(target.first, rank, moments=call.input_moments())
        else:
            layer = split(target.first, rank, init=config.init, scheme=config.conv_scheme)
        successors[target.first] = layer
        for dense in list(target.layers.values())[1:]:
            partner = empty_successor(dense, rank, init=config.init, scheme=config.conv_scheme)
            successors[dense] = share_factors_(partner, layer)
        return layer

    for_each(model, by_name, cut, calibration)
    return successors


def _replacement(target: Target, successors: Mapping[nn.Module, Factorized], init: str) -> Replacement:
    layer = successors[target.first]
    energy = None if layer.U.is_meta or init != "spectral" else kept_energy((target.matrix,), layer.U, layer.V)
    name, *tied = target.layers
    return Replacement(name, layer.kind, layer.shape, layer.rank, energy, tuple(tied), layer_record(layer))
