"""Ranks by a rule, and the cut: new layers for many targets, one after the other or as data run through the model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fnl.surgery.calibration import visit_modules
from hf_fnl.surgery.calibration_data import CalibrationData
from hf_fnl.surgery.heads import HeadTarget, Target, cut_heads
from hf_fnl.surgery.measure import HeadMomentsRequest, Request
from hf_fnl.surgery.ranks import Candidate
from hf_fnl.surgery.targets import Cut, Draw, LayerTarget, Replacements


def candidates_of(
    model: nn.Module, groups: Mapping[str, Sequence[Target]], data: CalibrationData | None, **options: bool
) -> list[Candidate]:
    """Return what ranks are chosen for: groups of targets that share one, by what they are called in errors.

    Their energies are squared singular values, in the metric of data if there are any, and measured when first asked
    for. Each target counts by its own share; where data reach all of them, by what the loss is expected to lose.

    Args:
        model: Any model.
        groups: Targets by names.
        data: Inputs of the model.
        **options: ``deep`` and ``overcomplete`` where they are set.
    """
    targets = [target for group in groups.values() for target in group]

    def in_loss() -> bool:
        return data is not None and data.is_felt and all(target.request is not None for target in targets)

    @functools.cache
    def spectra() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def measure(module_name: str, moments: Any) -> None:
            for target in (target for target in targets if target.module_name == module_name):
                if target.tensors[0].is_meta:
                    raise ValueError(f"{target.name} is on the meta device, where ranks cannot depend on spectra")
                found[target.name] = target.energies(moments)

        visit_modules(model, _requests(targets), measure, data, _ties(targets), changes=False)
        return found

    def energies(group: Sequence[Target], limit: int) -> Tensor:
        found = [spectra()[target.name] for target in group]
        if len(found) == 1:
            return found[0]
        units = (1 if in_loss() else e.sum().clamp(min=torch.finfo(e.dtype).tiny) for e in found)
        return torch.stack([e[:limit] / unit for e, unit in zip(found, units, strict=True)]).sum(0)

    candidates = []
    for name, group in groups.items():
        limits, counts, full = zip(*(target.sizes(**options) for target in group), strict=True)
        count = functools.partial(lambda counts, rank: sum(count(rank) for count in counts), counts)
        dense = sum(target.parameters for target in group)
        of_group = functools.partial(energies, group, min(limits))
        candidates.append(Candidate(name, min(limits), count, dense, of_group, min(full), in_loss))
    return candidates


def check_values(targets: Iterable[Target], *, calibrated: bool) -> None:
    """Raise a ``ValueError`` that names a target whose weight is not finite, or is not there to be calibrated."""
    for target in targets:
        for weight in target.tensors:
            if not weight.is_meta and not torch.stack(weight.aminmax()).isfinite().all():
                raise ValueError(f"the weight of {target.name} holds NaN or Inf")
            if weight.is_meta and calibrated:
                raise ValueError(f"{target.name} is on the meta device, where there is nothing to calibrate")


@torch.no_grad()
def cut(
    model: nn.Module,
    cuts: Sequence[Cut],
    data: CalibrationData | None = None,
    stds: Mapping[nn.Module, float] | None = None,
) -> Replacements:
    """Return new layers by those in whose places they belong; the model stays as it is.

    Args:
        model: Any model. What is drawn is drawn as it draws its own weights, if it is one of Transformers, and else as
            torch does.
        cuts: What is cut.
        data: In whose metric linear layers and heads are truncated when these reach them.
        stds: Standard deviations of what is drawn for layers that the model draws otherwise than their class says.
    """
    stds = stds or {}
    by_module: dict[str, list[Cut]] = {}
    for each in cuts:
        by_module.setdefault(each.target.module_name, []).append(each)
    replacements: Replacements = {}
    training = {module: module.training for module in model.modules()}

    def replace(module_name: str, moments: Any) -> Replacements:
        new: Replacements = {}
        for each in by_module[module_name]:
            if isinstance(each.target, LayerTarget):
                new |= each.target.cut(each, moments, _draw_as(model, each.target.first, stds))
        if heads := [each for each in by_module[module_name] if isinstance(each.target, HeadTarget)]:
            new |= cut_heads(heads, moments, lambda layer: _draw_as(model, layer, stds))
        replacements.update(new)
        if not heads:
            return new
        attention = model.get_submodule(module_name)
        return {**new, attention: _with(attention, {**replacements, **new})}

    targets = [each.target for each in cuts]
    visit_modules(model, _requests(targets), replace, data, _ties(targets))
    for dense, layer in replacements.items():
        layer.train(training[dense])  # calibration made it while the model was in evaluation mode
    return replacements


def _requests(targets: Iterable[Target]) -> dict[str, Request]:
    """Return the measurements to make at each module; the products of an attention are measured in one pass."""
    requests: dict[str, Request] = {}
    for target in targets:
        request, other = target.request, requests.get(target.module_name)
        if isinstance(request, HeadMomentsRequest) and isinstance(other, HeadMomentsRequest):
            sides = {side: getattr(request, side) or getattr(other, side) for side in ("query", "key", "output")}
            request = HeadMomentsRequest(request.num_heads, request.num_kv_heads, **sides)
        requests[target.module_name] = request
    return requests


def _ties(targets: Iterable[Target]) -> dict[str, list[str]]:
    return {t.name: list(t.layers)[1:] for t in targets if not isinstance(t, HeadTarget)}


def _with(module: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A module in which new layers are in the places of present ones; the module itself stays as it is."""
    children = {name: child and _with(child, replacements) for name, child in module._modules.items()}
    if module in replacements or all(child is module._modules[name] for name, child in children.items()):
        return replacements.get(module, module)
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)  # by which calibration answers for the module
    twin._modules = children
    return twin


def _draw_as(model: nn.Module, dense: nn.Module, stds: Mapping[nn.Module, float]) -> Draw:
    """Fills a weight as a Transformers model would that of ``dense``, or at a standard deviation."""
    if dense in stds:
        return lambda weight: weight.normal_(0.0, stds[dense])
    if not isinstance(model, PreTrainedModel):
        return None

    def draw(weight: Tensor) -> None:
        layer = copy.copy(dense)
        layer._parameters = {"weight": nn.Parameter(weight), "bias": None}
        model._init_weights(layer)

    return draw


def parameters_beside(model: nn.Module, targets: Iterable[Target]) -> int:
    """Return the number of a model's parameters that are in no target."""
    return sum(parameter.numel() for parameter in model.parameters()) - sum(target.parameters for target in targets)
