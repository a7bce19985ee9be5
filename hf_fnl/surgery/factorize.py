"""Surgery: layers and attention heads of any model become factors of a rank, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_fnl.surgery.calibration_data import Calibration, CalibrationData
from hf_fnl.surgery.config import FactorizationConfig
from hf_fnl.surgery.cut import candidates_of, check_values, cut, parameters_beside
from hf_fnl.surgery.heads import HeadTarget, Target
from hf_fnl.surgery.ranks import Candidate, choose_ranks
from hf_fnl.surgery.record import QUANT_METHOD, Layers, layer_records
from hf_fnl.surgery.select import by_reason, listed, select
from hf_fnl.surgery.swap import check_not_quantized, check_present, swap_and_record_, unwrapped
from hf_fnl.surgery.targets import Cut, LayerTarget, Replacements


@dataclass(frozen=True)
class Replacement:
    """A weight, or the products of an attention's heads, cut to factors of a rank.

    Args:
        name: Name of the layer, or of the attention followed by ``.qk`` or ``.ov``.
        kind: ``"linear"``, ``"embedding"``, ``"conv"``, ``"tensor"``, ``"qk"`` or ``"ov"``.
        shape: Shape of the matrix or tensor; of heads their number before it.
        rank: Columns of the factors.
        energy: Share of ``||W||_F^2`` that is kept, ``1 - ||W - U V^T||_F^2 / ||W||_F^2``; ``None`` where there was no
            weight to approximate.
        tied: Names of the other layers that hold the same weight.
        parameters_before: Parameters of the matrix or tensor, or of the projections.
        parameters_after: Parameters of the factors.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    energy: float | None
    tied: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        energy = "" if self.energy is None else f", energy {self.energy:.4f}"
        tied = f", tied to {', '.join(self.tied)}" if self.tied else ""
        return f"{self.name}: {self.kind} {' x '.join(map(str, self.shape))} at rank {self.rank}{energy}{tied}"


@dataclass(frozen=True)
class Factorization:
    """Report of what surgery did to a model.

    Args:
        replacements: One for each weight that became a product.
        skipped: The reason why it stayed dense, for each weight that looks like a matrix and that the patterns of the
            configuration name: by the name of its layer, or its own where it is no layer's weight.
        layers: What restores all layers of the model that hold factors or narrow heads, by their names.
    """

    replacements: tuple[Replacement, ...]
    skipped: Mapping[str, str]
    layers: Layers = field(repr=False)

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
        """Return the record for :func:`~hf_fnl.surgery.restore_`, ready for JSON."""
        return {"quant_method": QUANT_METHOD, "layers": self.layers}

    def __str__(self) -> str:
        before, after = self.parameters_before, self.parameters_after
        head = f"{len(self.replacements)} products, {before:,} -> {after:,} parameters ({after / before:.1%})"
        skipped = [f"{listed(names)}: dense, {reason}" for reason, names in self.skipped_by_reason().items()]
        return "\n  ".join([head, *map(str, self.replacements), *skipped])


@torch.no_grad()
def factorize_(
    model: nn.Module, config: FactorizationConfig, *, calibration: Calibration | None = None
) -> Factorization:
    """Replace layers of a model, in place, by factors of a rank, and cut the heads of its attentions to one.

    Layers that share a weight are factorized together, or not at all, and share their factors; the output embedding of
    a language model counts as an embedding. Layers that are factorized already stay as they are. Of a layer that cannot
    be factorized (a depthwise convolution, an embedding with ``max_norm``) the result tells why it was skipped. On the
    meta device only shapes change. If anything fails, the model is as it was.

    Heads are cut where ``kinds`` has ``"qk"`` or ``"ov"`` and their attention computes by such products, those that
    share a key or value together. The attention stays what it is: its layers fill narrow heads up with zeros, so that
    every kernel, cache and position works as before, and biases are cut along.

    Layers of the stock classes are taken and, where a pattern other than ``"*"`` names them, of classes derived from
    these with the same forward pass. Hooks and attributes of a layer go over to the one that takes its place. One that
    holds more than that (a parametrization, hooks for its weight's gradient, a forward of its own) is not taken.

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
            data are in front of them, and ranks that depend on spectra are chosen in it. Outputs count by what the
            model's loss feels of them, where batches hold no ``labels`` its distance from what it returned before, and
            a ``budget`` goes where the loss would lose most; a matrix that compresses badly then stays dense.

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
    targets, skipped = select(model, config)
    check_values(targets, calibrated=calibration is not None)
    data = None if calibration is None else CalibrationData(model, calibration)
    if data is not None:
        only_read = _only_read(targets, config, data)
        targets = [target for target in targets if target.name not in only_read]
        skipped |= only_read
    groups: dict[str, list[Target]] = {target.name: [target] for target in targets}
    candidates = candidates_of(model, groups, data, deep=config.deep, overcomplete=config.overcomplete)
    too_small = _below_rank(targets, candidates, config)
    candidates = [each for each in candidates if each.name not in too_small]
    ranks = choose_ranks(candidates, config, others=parameters_beside(model, targets))
    skipped |= too_small
    skipped |= {name: "its factors would hold as many parameters" for name, rank in ranks.items() if rank is None}
    chosen = ((target, rank) for target in targets if (rank := ranks.get(target.name)) is not None)
    cuts = [Cut(target, rank, config.init, config.deep, config.overcomplete) for target, rank in chosen]
    replacements = cut(model, cuts, data)
    done = tuple(_replacement(each, replacements) for each in cuts)
    if calibration is not None:
        for dense, layer in replacements.items():
            if getattr(dense, "bias", None) is not None and dense.bias.shape == layer.bias.shape:
                dense.get_parameter("bias").copy_(layer.get_parameter("bias"))
    swap_and_record_(model, replacements)
    return Factorization(done, skipped, layer_records(model))


_ONLY_READ = "the model reads its weight and does not call it"


def _only_read(targets: Sequence[Target], config: FactorizationConfig, data: CalibrationData) -> dict[str, str]:
    """Return why layers stay dense that are given nothing to be calibrated with, as they are never called."""
    layers = {target.name: list(target.layers.values()) for target in targets if isinstance(target, LayerTarget)}
    names = data.only_read(layers)
    if named := [name for name in names if config.matches_explicitly(name)]:
        raise ValueError(f"{named[0]} cannot be calibrated: {_ONLY_READ}")
    if len(names) == len(targets):
        raise ValueError(f"{listed(names)} cannot be calibrated: {_ONLY_READ}")
    return dict.fromkeys(names, _ONLY_READ)


def _below_rank(
    targets: Sequence[Target], candidates: Sequence[Candidate], config: FactorizationConfig
) -> dict[str, str]:
    """Return why what only ``"*"`` names stays dense where ``rank`` is above its largest; nothing if all would."""
    reasons = {
        each.name: f"its rank can be at most {each.limit}"
        for target, each in zip(targets, candidates, strict=True)
        if (config.rank or 0) > each.limit and not any(map(config.matches_explicitly, target.names))
    }
    return reasons if len(reasons) < len(candidates) else {}


def _replacement(cut: Cut, replacements: Replacements) -> Replacement:
    target: Any = cut.target
    known = not target.tensors[0].is_meta and cut.init == "spectral"
    return Replacement(
        target.name,
        target.kind,
        target.shape,
        cut.rank,
        target.kept_energy(replacements) if known else None,
        () if isinstance(target, HeadTarget) else target.names[1:],
        target.parameters,
        target.parameters_after(replacements),
    )
