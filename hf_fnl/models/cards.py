"""Model cards, written from a model and from the files beside it. One that a person wrote is never replaced."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from hf_fnl.layers import HeadProjection
from hf_fnl.optim.diagnostics import cut_layers, layer_count, parameter_count
from hf_fnl.surgery.record import method_of, quantization_of
from hf_fnl.utils.folders import is_inside
from hf_fnl.utils.run_files import (
    CONFIG_FILE,
    FACTORIZATION_FILE,
    METRICS_FILE,
    STATE_FILE,
    flatten,
    last_figures,
    phase_folders,
    read_json,
)
from hf_fnl.utils.suggest import one_line, printable

CARD_FILE = "README.md"
MARK = "<!-- Written by hf_fnl. Remove this line to keep the card from being written anew. -->"

# By these words a card is known for one that no person wrote: ours, or one of two that Transformers writes.
_AUTOMATIC = (MARK, "model card has been automatically generated", "model card has been generated automatically")
_TEMPLATE = Path(__file__).with_name("card_template.md")
_TRAINED_ON = ("dataset", "train_dataset")
_EVALUATED_ON = ("eval_dataset", "validation_dataset")
_EMBEDDED = ("embedded", "digits")  # data sets that lie in packages
_DATA_FILES = {".json", ".jsonl", ".parquet", ".txt", ".gz"}
_TASKS = {  # by the end of the names of classes
    "ForMaskedLM": "fill-mask",
    "LMHeadModel": "text-generation",
    "ForCausalLM": "text-generation",
    "MTModel": "translation",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
_SETTINGS = (
    *("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "weight_decay"),
    *("momentum", "lr_milestones", "num_train_epochs"),
    *("decay", "frobenius_decay", "frobenius_coefficient", "factor_decay", "overcomplete", "pruning"),
    *("max_seq_length", "mlm_probability", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("bf16", "fp16", "seed"),
)


@dataclass(frozen=True)
class Record:
    """Record of how a model was made; what is not known is empty.

    Args:
        metrics: Figures of the run by name, those of several phases under ``"phase-1 / eval_loss"``.
        settings: Options of the run.
        factorization: What ``hf-fnl factorize`` did: ``base_model``, ``command``, ``parameters_before``, ``layers``.
        steps: Optimizer steps of the run, all phases together.
    """

    metrics: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    factorization: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Record:
        """Read the JSON files of a model's or a run's folder; a run in phases has its logs in ``phase-*`` folders.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If one of the files is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"record must be the folder of a run or of a model; there is none at {folder}")
        states = [read_json(part / STATE_FILE) for part in (folder, *phase_folders(folder))]
        log = [entry for state in states for entry in state.get("log_history", [])]
        return cls(
            metrics=flatten(read_json(folder / METRICS_FILE)) or last_figures(log),
            settings=read_json(folder / CONFIG_FILE),
            factorization=read_json(folder / FACTORIZATION_FILE),
            steps=sum(state.get("global_step", 0) for state in states) or None,
        )

    @property
    def origins(self) -> list[str]:
        """Names or paths of the model that this one was made from."""
        # Where a model may also be a fresh one, `model` is the name of its sizes.
        source = self.settings.get("init_from" if "init_from" in self.settings else "model")
        return [name for name in (self.factorization.get("base_model"), source) if name]


def model_card(
    model: nn.Module,
    *,
    name: str | None = None,
    record: Record | str | os.PathLike[str] | None = None,
    data: str | None = None,
    command: str | None = None,
    metadata: ModelCardData | None = None,
) -> ModelCard:
    """Describe a model for the Hub: ranks, parameters before and after, data, metrics, settings, command, licence.

    What is not known is left out; a licence is never guessed.

    Args:
        model: The model: of ours, factorized in place, or merged.
        name: Id on the Hub, or path, under which it will be loaded.
        record: How it was made, or the folder of the run or model that says so.
        data: What it was trained on, in words. Default: the data sets in the record.
        command: The command that made it. Default: the one in the record.
        metadata: What only you know, such as ``license``, ``language`` or ``base_model``. It comes before what is read
            off; tags are added to ours.

    Raises:
        FileNotFoundError: If ``record`` is no folder.
        ValueError: If a file of the record is damaged.
    """
    if not isinstance(record, Record):
        record = Record() if record is None else Record.read(record)
    card_data = _metadata(model, record, name, metadata or ModelCardData())
    command = command or record.factorization.get("command")
    dense_class = getattr(model, "dense_class", None)
    layers, count = list(_layers(model)), parameter_count(model)
    total = {"before": int(count["dense_equivalent"]), "after": int(count["total"])}
    return ModelCard.from_template(
        card_data,
        template_path=str(_TEMPLATE),
        mark=MARK,
        title=_plain((name or type(model).__name__).rstrip("/").rpartition("/")[2]),
        name=printable(json.dumps(name or "path/to/model", ensure_ascii=False)),
        class_name=type(model).__name__,
        package=_package(model),
        dense_class=dense_class and dense_class.__name__,
        needs_hf_fnl=_needs_hf_fnl(model),
        is_quantized=_quantization(model) is not None,
        facts=[*_sizes(model), *_data(record), *_origin(record, card_data.base_model, data or card_data.datasets)],
        layers=layers,
        rest={when: total[when] - sum(layer[when] for layer in layers) for when in total},
        total=total,
        evaluated_on=_plain(_sources(record, _EVALUATED_ON)),
        results=[(_plain(key), _number(value)) for key, value in record.metrics.items() if _is_result(key, value)],
        settings=[(key, _plain(listed)) for key in _SETTINGS if (listed := _listed(record.settings.get(key)))],
        command=command and _one_line(command),
        licence=_plain(_listed(card_data.license)),
    )


def write_card(path: str | os.PathLike[str], model: nn.Module, **known: Any) -> bool:
    """Write the card of a model, unless a person wrote the one that is there.

    Args:
        path: The file, by custom ``README.md`` beside the weights.
        model: The model.
        known: Further arguments of :func:`model_card`.

    Returns:
        Whether it was written.
    """
    path = Path(path)
    if path.is_file() and not any(words in path.read_text("utf-8", "replace") for words in _AUTOMATIC):
        return False
    model_card(model, **known).save(path)
    return True


def stated_in(path: Path, keys: Sequence[str]) -> ModelCardData:
    """Return what the head of a card says under some keys, as texts and lists of texts.

    Args:
        path: The card; a warning tells if its head cannot be read, and nothing is taken from it.
        keys: Fields of ``ModelCardData``.
    """
    try:
        if not is_inside(path, path.parent):
            raise ValueError("it is a link that leaves its folder")
        found = vars(ModelCard.load(path, ignore_metadata_errors=True).data)
    except Exception as error:  # of YAML, of the Hub's client, or of the file: a card is no reason to lose the model
        reason = _one_line(error)[:200]
        warnings.warn(f"what {path} says in its head is left out, for it cannot be read: {reason}", stacklevel=2)
        return ModelCardData()
    stated: dict[str, Any] = {key: _texts(found.get(key)) for key in keys}
    if isinstance(stated.get("tags"), str):
        stated["tags"] = [stated["tags"]]
    return ModelCardData(**stated)


def _texts(value: Any) -> str | list[str] | None:
    """A text on one line, or the texts of a list; nothing of anything else."""
    values = value if isinstance(value, list) else [value]
    values = ["no" if each is False else each for each in values]  # as YAML reads the code of Norwegian
    texts = [_one_line(each) for each in values if isinstance(each, str)]
    return (texts if isinstance(value, list) else texts[0]) if texts else None


def _metadata(model: nn.Module, record: Record, name: str | None, stated: ModelCardData) -> ModelCardData:
    """The head of a card, which the Hub reads."""
    given = {key: value for key, value in vars(stated).items() if value is not None}
    origins = [*record.origins, getattr(model, "name_or_path", "")]
    needs_hf_fnl, quantization = _needs_hf_fnl(model), _quantization(model)
    derived = {
        # By this name the Hub shows how a model is loaded; Transformers alone cannot load a factorized one.
        "library_name": "hf_fnl" if needs_hf_fnl else "transformers",
        "pipeline_tag": "translation" if "languages" in record.settings else _task_of(model),
        "base_model": next((origin for origin in origins if _is_hub_id(origin) and origin != name), None),
        "datasets": [data for key in _TRAINED_ON if _is_hub_id(data := record.settings.get(key))] or None,
    }
    tags = {
        "hf_fnl": True,
        "transformers": needs_hf_fnl and isinstance(model, PreTrainedModel),
        "low-rank": bool(record.factorization or _model_ranks(model) or cut_layers(model)),
        "flambe": record.settings.get("optim") == "flambe",
        "healed": bool(record.factorization.get("healing")),
        str(quantization): quantization is not None,
    }
    ours = [tag for tag, holds in tags.items() if holds]
    return ModelCardData(**{**derived, **given, "tags": list(dict.fromkeys(ours + given.get("tags", [])))})


def _package(model: nn.Module) -> str:
    return type(model).__module__.partition(".")[0]


def _needs_hf_fnl(model: nn.Module) -> bool:
    """Whether a model is loaded by what is in this package: its class, or layers that surgery made."""
    return _package(model) == "hf_fnl" or hasattr(model, "dense_class") or bool(cut_layers(model))


def _quantization(model: nn.Module) -> str | None:
    """The name of the method by which a model was quantized, if it was."""
    found = quantization_of(getattr(getattr(model, "config", None), "quantization_config", None))
    return None if found is None else method_of(found)


def _task_of(model: nn.Module) -> str | None:
    """The Hub's task for the head of a model, if there is exactly one."""
    name = getattr(model, "dense_class", type(model)).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _sizes(model: nn.Module) -> Iterator[tuple[str, str]]:
    count = parameter_count(model)
    before, after = int(count["dense_equivalent"]), int(count["total"])
    yield "class", f"`{type(model).__name__}`"
    if ranks := _model_ranks(model):
        yield "ranks", ", ".join(f"`{option}` {_spread(rank)}" for option, rank in ranks.items())
    yield "parameters", f"{after:,}"
    if before != after:
        yield "parameters of the dense model", f"{before:,}, of which {after / before:.1%} are left"
    if quantization := _quantization(model):
        yield "quantized by", _plain(quantization)


def _data(record: Record) -> Iterator[tuple[str, str]]:
    """The texts that a model was cut and healed with, as ``hf-fnl factorize`` wrote them down."""
    if texts := record.factorization.get("calibration"):
        yield (
            "calibrated with",
            f"{record.factorization['calibration_tokens']:,} tokens of {_plain(_public(texts['source']))}",
        )
    if healing := record.factorization.get("healing"):
        texts = f"{healing['tokens']:,} tokens of {_plain(_public(healing['texts']['source']))}"
        yield "healed with", f"{texts} in {healing['steps']:,} steps"
        distance = " to ".join(f"{healing[f'held_out_{when}']:.3g}" for when in ("before", "after"))
        yield "distance from the dense model, held out", distance


def _origin(record: Record, base_model: Any, data: Any) -> Iterator[tuple[str, str]]:
    facts = {
        "made from": _listed(base_model) or next(map(_public, record.origins), ""),
        "trained on": _listed(data) or _sources(record, _TRAINED_ON),
        "optimizer steps": f"{record.steps:,}" if record.steps else "",
    }
    yield from ((fact, _plain(value)) for fact, value in facts.items() if value)


def _layers(model: nn.Module) -> Iterator[dict[str, Any]]:
    """A row for the factorized layers of each kind and shape."""
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    layer: Any
    for layer in cut_layers(model):
        kind = "heads" if isinstance(layer, HeadProjection) else getattr(layer, "kind", "linear")
        groups[kind, " x ".join(map(str, getattr(layer, "shape", layer.dense_shape)))].append(layer)
    for (kind, shape), layers in groups.items():
        after, before = map(sum, zip(*map(layer_count, layers), strict=True))
        of_heads = [rank for layer in layers if kind == "heads" for _, rank in layer.heads]
        ranks = _spread(of_heads or [layer.rank for layer in layers])
        yield {"kind": kind, "shape": shape, "count": len(layers), "rank": ranks, "before": before, "after": after}


def _model_ranks(model: nn.Module) -> dict[str, Any]:
    """The ranks in the configuration of a model of ours; none of another."""
    config = getattr(model, "config", None)
    values = {option: getattr(config, option) for option in getattr(config, "rank_options", list)()}
    return {option: rank for option, rank in values.items() if (any(rank) if isinstance(rank, list) else rank)}


def _spread(ranks: Any) -> str:
    """One rank, or the least and the largest of several; a layer without one is dense."""
    values = ranks if isinstance(ranks, list) else [ranks]
    numbers = sorted({rank for rank in values if rank is not None})
    spread = " to ".join(map(str, dict.fromkeys((*numbers[:1], *numbers[-1:]))))
    return f"{spread}, dense in {values.count(None)} of {len(values)} layers" if None in values else spread


def _is_hub_id(name: Any) -> TypeGuard[str]:
    """Whether a name is written as an id on the Hub and is no file, folder or embedded data set here."""
    if not isinstance(name, str) or name in _EMBEDDED or Path(name).exists() or Path(name).suffix in _DATA_FILES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_result(metric: str, value: Any) -> bool:
    """Whether a figure of a run says how good the model is, or how long that took."""
    size_or_speed = metric.startswith("parameters / ") or metric.endswith(("_per_second", "_flos"))
    return isinstance(value, int | float) and not size_or_speed


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _sources(record: Record, options: Sequence[str]) -> str:
    return ", ".join(_public(source) for option in options if (source := record.settings.get(option)))


def _public(source: Any) -> str:
    """A name to publish, or several: of a path, which nobody else has, the last part only."""
    if isinstance(source, list | tuple):
        return ", ".join(map(_public, source))
    return source if _is_hub_id(source) else Path(str(source)).name


def _listed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value in (None, False) else str(value)


def _plain(value: object) -> str:
    """Text that Markdown shows as it is: on one line, no table cell, link, markup or HTML in it."""
    return re.sub(r"([\\`*\[\]<>|&$~]|\b_|_\b)", r"\\\1", _one_line(value))


def _one_line(value: object) -> str:
    return printable(one_line(value))
