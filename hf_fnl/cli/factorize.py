"""``hf-fnl factorize``: a folder with a factorized model from one with a dense model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from hf_fnl.attention import find_products
from hf_fnl.cli.folders import carry_files, local_files, new_folder
from hf_fnl.cli.sources import factorized_classes, load_to_convert
from hf_fnl.cli.terminal import Terminal
from hf_fnl.cli.texts import Read, Texts, calibration_batches, read_texts
from hf_fnl.layers.linear import dense_weight
from hf_fnl.math.factors import kept_energy
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.cards import CARD_FILE, stated_in, write_card
from hf_fnl.optim.diagnostics import cut_layers, parameter_count
from hf_fnl.surgery import factorize_
from hf_fnl.surgery.calibration_data import Calibration
from hf_fnl.surgery.config import FactorizationConfig, RankRule
from hf_fnl.utils.files import write_json
from hf_fnl.utils.run_files import FACTORIZATION_FILE
from hf_fnl.utils.suggest import listed

Layer = dict[str, Any]

_COLUMNS = ("name", "kind", "shape", "rank", "parameters_before", "parameters_after", "energy")
_HEALING_LENGTH = 256  # tokens of a sample, of which four make a batch
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "tags")


class Healing(NamedTuple):
    """Texts that a cut model is trained with, for how many steps, and whether in bfloat16."""

    texts: Texts
    steps: int
    bf16: bool = False

    @classmethod
    def on(cls, source: str, column: str, steps: int, *, bf16: bool = False) -> Healing:
        """Texts of which no sample is seen twice, with a tenth to hold out, where there are so many."""
        return cls(Texts(source=source, column=column, samples=5 * steps, length=_HEALING_LENGTH), steps, bf16)


class How(NamedTuple):
    """The layers that are factorized, and how far: by a rule, or by ranks that the options of our classes name."""

    rule: RankRule | None
    ranks: Mapping[str, int]
    kinds: tuple[str, ...]  # of products or layers; empty for the usual ones
    include: tuple[str, ...]  # patterns of layer names, for surgery
    exclude: tuple[str, ...]
    conv_scheme: str
    surgery: bool  # even where there is a class of ours


def factorize(
    source: str,
    target: Path,
    *,
    how: How,
    texts: Texts | None,
    heal: Healing | None,
    command: str,
    terminal: Terminal,
) -> dict[str, Any]:
    """Load, factorize, heal and write a model; returns what ``factorization.json`` holds, ``command`` included.

    Raises:
        OSError: If files are missing, damaged or cannot be written.
        ValueError: If what was asked for does not fit the model.
    """
    with new_folder(target) as folder:
        read = None if texts is None else read_texts(source, texts)
        read_to_heal = None if heal is None else read_texts(source, heal.texts)
        dense = load_to_convert(source, terminal)
        ours = _class_for(dense, source, how)
        before = int(parameter_count(dense)["total"])
        batches, tokens = None, None
        if texts is not None and read is not None:
            with terminal.step("reading texts"):
                batches = calibration_batches(dense, read, texts)
            tokens = sum(batch["input_ids"].numel() for batch in batches)
            if tokens < (asked := texts.samples * texts.length):
                terminal.note(f"note: {texts.source} gives {tokens:,} tokens to calibrate with, not {asked:,}")
        with terminal.step("factorizing"):
            model, layers = _convert(dense, ours, how, batches) if ours else _operate(dense, how, batches, terminal)
        healed = None
        if heal is not None and read_to_heal is not None:
            teacher = dense if ours else load_to_convert(source, terminal)
            with terminal.step("healing"):
                healed = _heal(model, teacher, read_to_heal, heal, terminal)
        after = int(parameter_count(model)["total"])
        record = {
            "base_model": source,
            "command": command,
            "calibration": None if texts is None else asdict(texts),
            "calibration_tokens": tokens,
            "healing": healed,
            "parameters_before": before,
            "parameters_after": after,
            "ratio": after / before,
            "layers": layers,
        }
        with terminal.step("writing"):
            model.save_pretrained(folder)
            carry_files(source, folder)
            write_json(folder / FACTORIZATION_FILE, record)
            known = {"record": folder, "metadata": inherited_metadata(source)}
            write_card(folder / CARD_FILE, model, name=target.resolve().name, **known)
    return record


def _heal(
    model: PreTrainedModel, teacher: PreTrainedModel, read: Read, heal: Healing, terminal: Terminal
) -> dict[str, Any]:
    """Heal a model, in place; returns the texts, and its distance from the dense one before and after."""
    from hf_fnl.training import heal_  # which imports much

    batches = calibration_batches(teacher, read, heal.texts)
    hides_bar = not terminal.interactive
    losses = heal_(model, teacher, batches, steps=heal.steps, bf16=heal.bf16, disable_tqdm=hides_bar)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {"texts": asdict(heal.texts), "tokens": tokens, "steps": heal.steps, "bf16": heal.bf16, **losses}


def _class_for(dense: PreTrainedModel, source: str, how: How) -> type[FactorizedPreTrainedModel] | None:
    """Our class to make from a model, or ``None`` for surgery; what does not fit the model is refused."""
    name = type(dense).__name__
    if cut_layers(dense):
        raise ValueError(f"{source} is factorized already, a {name}; hf-fnl merge makes it dense")
    ours = None if how.surgery else factorized_classes().get(type(dense))
    if ours is None and how.ranks:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in how.ranks)
        raise ValueError(f"{options}: a {name} is factorized layer by layer; use --rank, --ratio or another rule")
    if ours is not None and (how.include or how.exclude):
        raise ValueError(f"--include and --exclude need --surgery for a {name}; --kinds does not")
    return ours


def _convert(
    dense: PreTrainedModel, ours: type[FactorizedPreTrainedModel], how: How, calibration: Calibration | None
) -> tuple[PreTrainedModel, list[Layer]]:
    """A model of our class, and what became of the products of the dense one."""
    options: dict[str, Any] = {**how.ranks, "rule": how.rule, "calibration": calibration}
    if how.kinds:
        options["kinds"] = how.kinds
    model = ours.from_dense(dense, **options)
    return model, list(_layers(dense, model))


def _operate(
    dense: PreTrainedModel, how: How, calibration: Calibration | None, terminal: Terminal
) -> tuple[PreTrainedModel, list[Layer]]:
    """The model itself after surgery, and what became of its layers."""
    patterns = {"kinds": how.kinds, "include": how.include, "exclude": how.exclude}
    options: dict[str, Any] = {name: value for name, value in patterns.items() if value} | vars(how.rule)
    options["conv_scheme"] = how.conv_scheme
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


def inherited_metadata(source: str) -> ModelCardData:
    """Return the licence, language and task of a model, from its card, which hold of one made from it as well."""
    path = local_files(source, [CARD_FILE]) / CARD_FILE
    return stated_in(path, _INHERITED) if path.is_file() else ModelCardData()
