"""Training and generation of factorized GPT-2 and Marian against the stock classes: tokens a second beside operations.

python -m benchmarks.language [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel, PreTrainedModel

from benchmarks.common import count_flops, interleave, parse, write
from hf_fnl import (
    FactorizedGPT2Config,
    FactorizedGPT2LMHeadModel,
    FactorizedMarianConfig,
    FactorizedMarianMTModel,
)

STOCK = "stock"
WARMUP = 1
PROMPT, NEW_TOKENS = 32, 32
GPT2 = {"vocab_size": 50257, "bos_token_id": 0, "eos_token_id": None}
MARIAN = {
    "vocab_size": 10000,
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "forced_eos_token_id": None,
}

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A stock class and its configuration, and fields of the factorized configurations measured against it."""

    name: str
    stock: tuple[type[PreTrainedModel], Any]
    ours: tuple[type[PreTrainedModel], Any]
    sizes: dict[str, Any]
    cases: dict[str, dict[str, Any]]
    length: int
    beams: int

    def models(self, device: str, **fewer: int) -> dict[str, PreTrainedModel]:
        """The stock model and ours of the same sizes."""
        model_class, config_class = self.stock
        models = {STOCK: model_class(config_class(**self.sizes, **fewer))}
        model_class, config_class = self.ours
        for name, fields in self.cases.items():
            models[name] = model_class(config_class(**self.sizes, **fewer, factor_init="default", **fields))
        return {name: model.to(device) for name, model in models.items()}


FAMILIES = (
    Family(
        "GPT-2 small",
        (GPT2LMHeadModel, GPT2Config),
        (FactorizedGPT2LMHeadModel, FactorizedGPT2Config),
        GPT2,
        {
            "dense, fused loss": {},
            "qkv and ffn 480 (K22)": {"qkv_rank": 480, "ffn_rank": 480},
            "qkv and ffn 192": {"qkv_rank": 192, "ffn_rank": 192},
            "qk and ov 32, ffn 192": {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 192},
        },
        length=256,
        beams=1,
    ),
    Family(
        "Marian of K21",
        (MarianMTModel, MarianConfig),
        (FactorizedMarianMTModel, FactorizedMarianConfig),
        MARIAN,
        {
            "rank scale 0.5": {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 128, "embedding_rank": 128},
            "rank scale 0.25": {"qk_rank": 16, "ov_rank": 16, "ffn_rank": 64, "embedding_rank": 64},
        },
        length=32,
        beams=4,
    ),
)


def training_step(model: PreTrainedModel, batch: Batch) -> None:
    """Forward and backward."""
    model.train().zero_grad()
    model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()


def generation(family: Family) -> Callable[[PreTrainedModel, Batch], Tensor]:
    """Generates ``NEW_TOKENS`` for every sequence."""

    def generate(model: PreTrainedModel, batch: Batch) -> Tensor:
        lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        return model.eval().generate(**batch, **lengths, num_beams=family.beams, do_sample=False)

    return generate


def random_batch(family: Family, sequences: int, length: int, device: str) -> Batch:
    """Random token ids without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, family.sizes["vocab_size"], (sequences, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_tokens(family: Family, models: dict[str, PreTrainedModel], device: str) -> None:
    """Raise a ``RuntimeError`` unless every model of ours generates the tokens of the stock model that it merges to."""
    batch, generate = random_batch(family, 2, 8, device), generation(family)
    for name, model in models.items():
        if name != STOCK and not torch.equal(generate(model, batch), generate(model.merge(), batch)):
            raise RuntimeError(f"{family.name}, {name}: other tokens than those of the merged model; nothing was timed")


def measure(family: Family, rounds: int, device: str, **fewer: int) -> list[dict[str, Any]]:
    """Rows of a family: tokens a second and their ratios, beside the ratios of operations."""
    models = family.models(device, **fewer)
    check_tokens(family, models, device)
    workloads: dict[str, tuple[Callable[[PreTrainedModel, Batch], object], Batch, int]] = {
        "training": (training_step, random_batch(family, 4, family.length, device), 4 * family.length)
    }
    for sequences in (1, 32):
        batch = random_batch(family, sequences, PROMPT, device)
        workloads[f"generate, batch {sequences}"] = generation(family), batch, sequences * NEW_TOKENS
    label = f"{family.name}{''.join(f', {name} {value}' for name, value in fewer.items())}"
    return [
        row
        for name, (step, batch, tokens) in workloads.items()
        for row in _rows(f"{label}: {name}", models, step, batch, tokens, rounds)
    ]


def _rows(
    workload: str,
    models: dict[str, PreTrainedModel],
    step: Callable[[PreTrainedModel, Batch], object],
    batch: Batch,
    tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    flops = {name: count_flops(model, step, batch) for name, model in models.items()}
    cases = {name: (lambda model=model: step(model, batch)) for name, model in models.items()}
    seconds = interleave(cases, rounds=rounds, warmup=WARMUP)
    rows = []
    for name, model in models.items():
        speedup = median(stock / ours for stock, ours in zip(seconds[STOCK], seconds[name], strict=True))
        fewer = flops[STOCK] / flops[name]
        rows.append(
            {
                "workload": workload,
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens_per_second": tokens / median(seconds[name]),
                "speedup": speedup,
                "fewer_flops": fewer,
                "speedup_per_fewer_flops": speedup / fewer,
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, measure, write; returns the rows."""
    args = parse("language", __doc__, "four layers of GPT-2, three rounds", argv)
    rounds = 3 if args.quick else 5
    fewer = {"GPT-2 small": {"n_layer": 4}} if args.quick else {}
    rows = [row for family in FAMILIES for row in measure(family, rounds, args.device, **fewer.get(family.name, {}))]
    write("language", args.device, rows, args.command, args.out)
    return rows


if __name__ == "__main__":
    main()
