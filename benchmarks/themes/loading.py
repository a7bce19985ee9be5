"""Loading a factorized BERT checkpoint against loading a stock one of as many bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import BertConfig, BertForPreTraining, PreTrainedModel
from transformers.utils import logging

from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Case, Comparison, Goal, Row
from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining

STOCK, OURS = "stock class", "factorized class"
GOAL = Goal(STOCK, slower=1.1)
PAGE = 4096  # bytes
DECOMPOSITIONS = ("svd", "svdvals", "eigh", "eigvalsh", "qr", "cholesky")

Load = Callable[[type[PreTrainedModel], Path, str], object]


def _sizes(options: Options) -> dict[str, int]:
    return {
        "hidden_size": options.pick(full=768, quick=768, tiny=48),
        "num_attention_heads": 12,
        "vocab_size": options.pick(full=30522, quick=30522, tiny=301),
    }


def factorized_model(layers: int, options: Options) -> PreTrainedModel:
    """BERT-base with factorized layers; how the factors were drawn does not matter to loading."""
    sizes = _sizes(options)
    hidden = sizes["hidden_size"]
    config = FactorizedBertConfig(
        **sizes,
        num_hidden_layers=layers,
        intermediate_size=4 * hidden,
        factor_init="default",
        qk_rank=hidden // 16,
        ov_rank=hidden // 16,
        ffn_rank=hidden // 2,
    )
    return FactorizedBertForPreTraining(config)


def stock_model(layers: int, parameters: int, options: Options) -> PreTrainedModel:
    """A stock BERT of that depth whose feed-forward width brings it as close as can be to a number of parameters."""

    def build(width: int) -> PreTrainedModel:
        config = BertConfig(**_sizes(options), num_hidden_layers=layers, intermediate_size=width)
        return BertForPreTraining(config)

    with torch.device("meta"):
        one, two = (build(width).num_parameters() for width in (1, 2))
    return build(1 + round((parameters - one) / (two - one)))


@contextmanager
def saved(layers: int, options: Options) -> Iterator[tuple[Path, Mapping[str, PreTrainedModel]]]:
    """A folder with both models in it, and the models."""
    logging.disable_progress_bar()
    ours = factorized_model(layers, options)
    models = {STOCK: stock_model(layers, ours.num_parameters(), options), OURS: ours}
    with tempfile.TemporaryDirectory() as name:
        for case, model in models.items():
            model.save_pretrained(Path(name) / case)
        yield Path(name), models


@contextmanager
def no_decompositions() -> Iterator[None]:
    """Every decomposition fails."""
    failure = mock.Mock(side_effect=RuntimeError("a checkpoint was decomposed while loading; nothing was timed"))
    with mock.patch.multiple(torch.linalg, **dict.fromkeys(DECOMPOSITIONS, failure)):
        yield


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless checkpoints come back bit for bit and without a decomposition."""
    with saved(2, options) as (folder, models), no_decompositions():
        for case, model in models.items():
            loaded = load(type(model), folder / case, options.device).state_dict()
            state = model.state_dict()
            if changed := [name for name, value in state.items() if not torch.equal(value, loaded[name].cpu())]:
                raise RuntimeError(f"{', '.join(changed)} did not come back from {folder}; nothing was timed")


def load(model_class: type[PreTrainedModel], folder: Path, device: str) -> PreTrainedModel:
    """``from_pretrained`` alone, which on a CPU maps the file into memory and leaves it to the first use to read it."""
    loaded: PreTrainedModel = model_class.from_pretrained(folder, device_map=device)
    return loaded


def load_and_read(model_class: type[PreTrainedModel], folder: Path, device: str) -> None:
    """``from_pretrained`` and a look at every page of every weight."""
    for parameter in load(model_class, folder, device).parameters():
        parameter.detach().flatten()[:: PAGE // parameter.element_size()].sum()


def _cases(function: Load, folder: Path, models: Mapping[str, PreTrainedModel], device: str) -> dict[str, Case]:
    return {case: partial(function, type(model), folder / case, device) for case, model in models.items()}


def measure(options: Options) -> Iterator[Row]:
    """``from_pretrained`` alone, and with a look at what was loaded."""
    layers, rounds = options.pick(full=(12, 21), quick=(2, 7), tiny=(2, 2))
    with saved(layers, options) as (folder, models):
        facts: dict[str, dict[str, Any]] = {
            case: {"megabytes": _file(folder / case).stat().st_size / 2**20, "tensors": len(model.state_dict())}
            for case, model in models.items()
        }
        for what, function in (("from_pretrained", load), ("from_pretrained, then read", load_and_read)):
            yield from Comparison(
                f"{what}, {layers} layers",
                _cases(function, folder, models, options.device),
                against=STOCK,
                goals={OURS: GOAL},
                facts=facts,
            ).measure(options.device, rounds=rounds)


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"


THEME = Theme("loading", check, measure)
