"""Factorized Marian against the stock class: training steps and beam search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel, PreTrainedModel

from benchmarks.harness.limits import count_flops
from benchmarks.harness.steps import Batch, Contender, Steps
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Case, Comparison, Row
from hf_fnl import FactorizedMarianConfig, FactorizedMarianMTModel

STOCK, BEAMS = "stock", 4
SMALL = {  # of Khodak et al. 2021
    "vocab_size": 10000,
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 1024,
    "decoder_ffn_dim": 1024,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 512,
}
BASE = {  # of the published opus-mt models
    **SMALL,
    "vocab_size": 58000,
    "d_model": 512,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
}
TINY = {**SMALL, "vocab_size": 300, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
TOKENS = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None}


def sizes(options: Options) -> dict[str, Any]:
    """Fields of the configuration."""
    return {**options.pick(full=BASE if options.on_gpu else SMALL, quick=SMALL, tiny=TINY), **TOKENS}


def scaled(fields: dict[str, Any], scale: float) -> dict[str, int]:
    """Ranks that are this share of what they can be."""
    width = fields["d_model"]
    head = round(scale * width / fields["encoder_attention_heads"])
    return {
        "qk_rank": head,
        "ov_rank": head,
        "ffn_rank": round(scale * min(width, fields["encoder_ffn_dim"])),
        "embedding_rank": round(scale * width),
    }


def ours(fields: dict[str, Any], scale: float | None, device: str) -> PreTrainedModel:
    """A model of ours; how its factors were drawn does not matter to time."""
    ranks = {} if scale is None else scaled(fields, scale)
    return FactorizedMarianMTModel(FactorizedMarianConfig(factor_init="default", **fields, **ranks)).to(device)


def models(options: Options) -> dict[str, PreTrainedModel]:
    """The stock model, and ours of several ranks."""
    fields = sizes(options)
    made = {STOCK: MarianMTModel(MarianConfig(**fields)).to(options.device)}
    for scale in options.pick(full=(0.5, 0.25), quick=(0.5, 0.25), tiny=(0.25,)):
        made[f"rank scale {scale}"] = ours(fields, scale, options.device)
    return made


def batches(count: int, vocabulary: int, shape: tuple[int, int], device: str) -> list[Batch]:
    """Random sentences and translations without padding."""
    made = []
    for _ in range(count):
        source, target = (torch.randint(2, vocabulary, shape).to(device) for _ in range(2))
        made.append({"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target})
    return made


def training(options: Options, workload: str, vocabulary: int, shape: tuple[int, int], count: int) -> Steps:
    """Forward and backward passes, in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if options.on_gpu else None
    inputs = batches(count + 3, vocabulary, shape, options.device)
    return Steps(f"{workload}, {shape[0]} x {shape[1]}", inputs, shape[0] * shape[1], options.device, dtype)


def beam_search(model: PreTrainedModel, source: Tensor, new: int) -> Case:
    """Translations of always the same length."""
    inputs = {"input_ids": source, "attention_mask": torch.ones_like(source)}
    lengths = {"min_new_tokens": new, "max_new_tokens": new}
    return lambda: model.generate(**inputs, **lengths, num_beams=BEAMS, do_sample=False)


@torch.no_grad()
def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless every model of ours translates as the stock model does that it merges to."""
    for name, model in models(options).items():
        if name != STOCK:
            source = torch.randint(2, model.config.vocab_size, (2, 8), device=options.device)
            tokens = [beam_search(each.eval(), source, 6)() for each in (model, model.merge())]
            if not torch.equal(*tokens):
                raise RuntimeError(f"{name}: other tokens than those of the merged model; nothing was timed")


def measure(options: Options) -> Iterator[Row]:
    """Training, then translation of one sentence and of many."""
    made = models(options)
    shape = options.pick(full=(256, 64) if options.on_gpu else (32, 32), quick=(16, 32), tiny=(2, 8))
    rounds = options.pick(full=15, quick=5, tiny=2)
    vocabulary = made[STOCK].config.vocab_size
    contenders = {name: Contender(model.train()) for name, model in made.items()}
    steps = training(options, "Marian: training step", vocabulary, shape, rounds)
    yield from steps.measure(contenders, STOCK, rounds=rounds)
    new = options.pick(full=32, quick=16, tiny=3)
    for sentences in options.pick(full=(1, 32), quick=(1, 32), tiny=(1, 2)):
        yield from _translation(options, made, torch.randint(2, vocabulary, (sentences, shape[1])), new)


def _translation(options: Options, made: dict[str, PreTrainedModel], source: Tensor, new: int) -> Iterator[Row]:
    source = source.to(options.device)
    cases = {name: beam_search(model.eval(), source, new) for name, model in made.items()}
    flops = {name: count_flops(case) for name, case in cases.items()}
    comparison = Comparison(
        f"Marian: beam search, {BEAMS} beams, {new} tokens, batch {len(source)}",
        cases,
        STOCK,
        limits={name: flops[STOCK] / count for name, count in flops.items()},
        facts={name: {"parameters": sum(p.numel() for p in model.parameters())} for name, model in made.items()},
    )
    rounds = options.pick(full=5, quick=3, tiny=2)
    for row in comparison.measure(options.device, rounds=rounds, warmup=1):
        yield {**row, "tokens_per_second": len(source) * new / row["milliseconds"] * 1e3}


THEME = Theme("marian", check, measure)
