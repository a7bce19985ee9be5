"""Loading a factorized BERT checkpoint against loading a stock one of as many bytes.

python -m benchmarks.loading [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from transformers import BertConfig, BertForPreTraining, PreTrainedModel
from transformers.utils import logging

from benchmarks.common import interleave, parse, write
from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining

STOCK, OURS = "stock", "factorized"
RANKS = {"qk_rank": 48, "ov_rank": 48, "ffn_rank": 384}
GOAL = 1.1
PAGE = 4096  # bytes
DECOMPOSITIONS = ("svd", "svdvals", "eigh", "eigvalsh", "qr")


def factorized_model(layers: int) -> PreTrainedModel:
    """BERT-base with factorized layers; how the factors were drawn does not matter to loading."""
    config = FactorizedBertConfig(num_hidden_layers=layers, factor_init="default", **RANKS)
    return FactorizedBertForPreTraining(config)


def stock_model(layers: int, parameters: int) -> PreTrainedModel:
    """A stock BERT of that depth whose feed-forward width brings it as close as can be to a number of parameters."""

    def build(intermediate_size: int) -> PreTrainedModel:
        return BertForPreTraining(BertConfig(num_hidden_layers=layers, intermediate_size=intermediate_size))

    with torch.device("meta"):
        one, two = (build(width).num_parameters() for width in (1, 2))
    return build(1 + round((parameters - one) / (two - one)))


@contextmanager
def no_decompositions() -> Iterator[None]:
    """Every decomposition fails."""
    failure = mock.Mock(side_effect=RuntimeError("a checkpoint was decomposed while loading; nothing was timed"))
    with mock.patch.multiple(torch.linalg, **dict.fromkeys(DECOMPOSITIONS, failure)):
        yield


def check_round_trip(model: PreTrainedModel, folder: Path, device: str) -> None:
    """Raise a ``RuntimeError`` unless a checkpoint comes back bit for bit and without a decomposition."""
    with no_decompositions():
        loaded = type(model).from_pretrained(folder, device_map=device).state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, loaded[name].cpu())]
    if changed:
        raise RuntimeError(f"{', '.join(changed)} did not come back from {folder}; nothing was timed")


def load(model_class: type[PreTrainedModel], folder: Path, device: str) -> PreTrainedModel:
    """``from_pretrained`` alone, which on a CPU maps the file into memory and leaves it to the first use to read it."""
    return model_class.from_pretrained(folder, device_map=device)


def load_and_read(model_class: type[PreTrainedModel], folder: Path, device: str) -> None:
    """``from_pretrained`` and a look at every page of every weight."""
    for parameter in load(model_class, folder, device).parameters():
        parameter.detach().flatten()[:: PAGE // parameter.element_size()].sum()


def measure(folder: Path, layers: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Save both models, check that they come back, and time loading them side by side."""
    ours = factorized_model(layers)
    models = {STOCK: stock_model(layers, ours.num_parameters()), OURS: ours}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        check_round_trip(model, folder / name, device)
    rows = []
    for what, function in (("from_pretrained", load), ("from_pretrained, then read", load_and_read)):
        cases = {name: partial(function, type(model), folder / name, device) for name, model in models.items()}
        seconds = interleave(cases, rounds=rounds, warmup=1)
        for name, model in models.items():
            times_stock = median(a / b for a, b in zip(seconds[name], seconds[STOCK], strict=True))
            rows.append(
                {
                    "measured": what,
                    "model": name,
                    "megabytes": (folder / name / "model.safetensors").stat().st_size / 2**20,
                    "tensors": len(model.state_dict()),
                    "seconds": median(seconds[name]),
                    "times_stock": times_stock,
                    "goal": GOAL if name == OURS else None,
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, measure, write; returns the rows."""
    args = parse("loading", __doc__, "two layers in place of twelve, five rounds", argv)
    layers, rounds = (2, 5) if args.quick else (12, 21)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), layers, rounds, args.device)
    write("loading", args.device, rows, args.command, args.out)
    return rows


if __name__ == "__main__":
    main()
