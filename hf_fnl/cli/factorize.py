"""``hf-fnl factorize``: a folder with a factorized model from one with a dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import Tensor
from transformers import PreTrainedModel

from hf_fnl.attention import find_products
from hf_fnl.cli.folders import carry_files, local_files, new_folder
from hf_fnl.cli.sources import factorized_classes, load_model
from hf_fnl.cli.terminal import Terminal
from hf_fnl.cli.texts import Texts, calibration_batch, read_texts
from hf_fnl.layers.linear import dense_weight
from hf_fnl.math.factors import kept_energy
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.cards import CARD_FILE, stated_in, write_card
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.surgery import factorize_
from hf_fnl.surgery.config import FactorizationConfig, RankRule
from hf_fnl.tasks.documents import looks_like_path
from hf_fnl.utils.files import write_json
from hf_fnl.utils.run_files import FACTORIZATION_FILE
from hf_fnl.utils.suggest import listed

Calibration = Mapping[str, Tensor] | None
Layer = dict[str, Any]

_COLUMNS = ("name", "kind", "shape", "rank", "parameters_before", "parameters_after", "energy")
_INHERITED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "tags")


@dataclass(frozen=True, kw_only=True)
class FactorizeRequest:
    """What ``hf-fnl factorize`` is asked for.

    Args:
        source: Folder or Hub id of the dense model.
        target: Folder to write.
        rule: How ranks are chosen; ``None`` where ``ranks`` says them.
        ranks: Ranks by the options of our classes, such as ``ffn_rank``.
        kinds: Kinds of products or layers; empty for the usual ones.
        include: Patterns of layer names, for surgery.
        exclude: Likewise.
        conv_scheme: How kernels are factorized, in surgery.
        surgery: Factorize in place even where there is a class of ours.
        texts: Text to calibrate with.
        overwrite: Replace a target that holds files.
        command: The command as it was typed.
    """

    source: str
    target: Path
    rule: RankRule | None
    ranks: Mapping[str, int]
    kinds: tuple[str, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    conv_scheme: str
    surgery: bool
    texts: Texts | None
    overwrite: bool
    command: str


def factorize(request: FactorizeRequest, terminal: Terminal) -> dict[str, Any]:
    """Load, factorize and write a model.

    Returns:
        What ``factorization.json`` holds.

    Raises:
        OSError: If files are missing, damaged or cannot be written.
        ValueError: If the request does not fit the model.
    """
    needed = [request.texts.source] if request.texts and looks_like_path(request.texts.source) else []
    with new_folder(request.target, source=request.source, overwrite=request.overwrite, needed=needed) as folder:
        read = None if request.texts is None else read_texts(request.source, request.texts)
        dense = load_model(request.source, terminal)
        ours = _class_for(dense, request)
        before = parameter_count(dense)["total"]
        batch, tokens = None, None
        if request.texts is not None and read is not None:
            with terminal.step("reading texts"):
                batch = calibration_batch(dense, read, request.texts)
            tokens = int(batch["attention_mask"].sum())
            if tokens < (asked := request.texts.samples * request.texts.length):
                terminal.note(f"note: {request.texts.source} gives {tokens:,} tokens to calibrate with, not {asked:,}")
        with terminal.step("factorizing"):
            model, layers = _convert(dense, ours, request, batch) if ours else _operate(dense, request, batch, terminal)
        record = _record(request, tokens, before, parameter_count(model)["total"], layers)
        with terminal.step("writing"):
            model.save_pretrained(folder)
            carry_files(request.source, folder)
            write_json(folder / FACTORIZATION_FILE, record)
            known = {"record": folder, "metadata": inherited_metadata(request.source)}
            write_card(folder / CARD_FILE, model, name=request.target.resolve().name, **known)
    return record


def _class_for(dense: PreTrainedModel, request: FactorizeRequest) -> type[FactorizedPreTrainedModel] | None:
    """Our class to make from a model, or ``None`` for surgery; an request that does not fit the model is refused."""
    name = type(dense).__name__
    if isinstance(dense, FactorizedPreTrainedModel):
        raise ValueError(f"{request.source} is factorized already, a {name}; hf-fnl merge makes it dense")
    ours = None if request.surgery else factorized_classes().get(type(dense))
    if ours is None and request.ranks:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in request.ranks)
        raise ValueError(f"{options}: a {name} is factorized layer by layer; use --rank, --ratio or another rule")
    if ours is not None and (request.include or request.exclude):
        raise ValueError(f"--include and --exclude need --surgery for a {name}; --kinds does not")
    return ours


def _convert(
    dense: PreTrainedModel, ours: type[FactorizedPreTrainedModel], request: FactorizeRequest, calibration: Calibration
) -> tuple[PreTrainedModel, list[Layer]]:
    """A model of our class, and what became of the products of the dense one."""
    options: dict[str, Any] = {**request.ranks, "rule": request.rule, "calibration": calibration}
    if request.kinds:
        options["kinds"] = request.kinds
    model = ours.from_dense(dense, **options)
    return model, list(_layers(dense, model))


def _operate(
    dense: PreTrainedModel, request: FactorizeRequest, calibration: Calibration, terminal: Terminal
) -> tuple[PreTrainedModel, list[Layer]]:
    """The model itself after surgery, and what became of its layers."""
    patterns = {"kinds": request.kinds, "include": request.include, "exclude": request.exclude}
    options: dict[str, Any] = {name: value for name, value in patterns.items() if value} | vars(request.rule)
    options["conv_scheme"] = request.conv_scheme
    done = factorize_(dense, FactorizationConfig(**options), calibration=calibration)
    for reason, names in done.skipped_by_reason().items():
        terminal.note(f"note: {listed(names)} {'stay' if len(names) > 1 else 'stays'} dense: {reason}")
    return dense, [{column: getattr(layer, column) for column in _COLUMNS} for layer in done.replacements]


@torch.no_grad()
def _layers(dense: PreTrainedModel, ours: PreTrainedModel) -> Iterator[Layer]:
    """The products of our model that are not as in the dense one."""
    attentions = {product.name: product for product in find_products(dense)}
    for product in find_products(ours):
        U, V = product.factors(ours)
        if product.name in attentions:
            matrix = attentions[product.name].factors(dense)
            if matrix[0].shape == U.shape:
                continue
        else:
            matrix = (dense_weight(dense.get_submodule(product.name)),)
        yield {
            "name": product.name,
            "kind": product.kind,
            "shape": (U.shape[-2], V.shape[-2]),
            "rank": U.shape[-1],
            "parameters_before": sum(factor.numel() for factor in matrix),
            "parameters_after": U.numel() + V.numel(),
            "energy": kept_energy(matrix, U, V),
        }


def _record(
    request: FactorizeRequest, tokens: int | None, before: float, after: float, layers: list[Layer]
) -> dict[str, Any]:
    return {
        "base_model": request.source,
        "command": request.command,
        "calibration": None if request.texts is None else asdict(request.texts),
        "calibration_tokens": tokens,
        "parameters_before": int(before),
        "parameters_after": int(after),
        "ratio": after / before,
        "layers": layers,
    }


def inherited_metadata(source: str) -> ModelCardData:
    """What holds of a model made from another as well: licence, language and task, from the card of that one."""
    path = local_files(source, [CARD_FILE]) / CARD_FILE
    return stated_in(path, _INHERITED) if path.is_file() else ModelCardData()
