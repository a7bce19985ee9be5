"""Training steps of factorized GPT-2 against the stock class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmarks.harness.steps import Batch, Contender, Steps, check_close
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Row
from hf_fnl import FactorizedGPT2Config, FactorizedGPT2LMHeadModel

STOCK = "stock"
QK_OV = {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 192}
RANKS: dict[str, dict[str, Any]] = {
    "dense, fused loss": {},
    "qkv and ffn 480 (K22)": {"qkv_rank": 480, "ffn_rank": 480},
    "qkv and ffn 192": {"qkv_rank": 192, "ffn_rank": 192},
    "qk and ov 32, ffn 192": QK_OV,
}
TINY = {"vocab_size": 500, "n_embd": 96, "n_head": 4, "n_layer": 1, "n_positions": 64}
TINY_RANKS: dict[str, dict[str, Any]] = {
    "dense, fused loss": {},
    "qk and ov 8, ffn 24": {"qk_rank": 8, "ov_rank": 8, "ffn_rank": 24},
}
TOLERANCE = 1e-3


def sizes(options: Options) -> dict[str, Any]:
    """Fields of the configuration of GPT-2 small that are others."""
    on_cpu = {"n_layer": 4}
    fields = options.pick(full={} if options.on_gpu else on_cpu, quick={"n_layer": 2}, tiny=TINY)
    return {"bos_token_id": 0, "eos_token_id": 0, **fields}


def cases(options: Options) -> dict[str, dict[str, Any]]:
    """Ranks by the name of the case."""
    return options.pick(full=RANKS, quick=RANKS, tiny=TINY_RANKS)


def ours(options: Options, **fields: Any) -> PreTrainedModel:
    """A model of ours, ready to train; how its factors were drawn does not matter to time."""
    return FactorizedGPT2LMHeadModel(FactorizedGPT2Config(factor_init="default", **fields)).to(options.device).train()


def stock(options: Options, config: GPT2Config) -> PreTrainedModel:
    """The stock model, ready to train, with the loss named that it takes anyway: its warning cannot be compiled."""
    model = GPT2LMHeadModel(config).to(options.device).train()
    model.loss_type = "ForCausalLM"
    return model


def batches(count: int, vocabulary: int, shape: tuple[int, int], device: str) -> list[Batch]:
    """Random token ids, all of them to be predicted."""
    drawn = (torch.randint(vocabulary, shape).to(device) for _ in range(count))
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def steps(options: Options, workload: str, vocabulary: int, shape: tuple[int, int], count: int) -> Steps:
    """Forward and backward passes, in bfloat16 on a GPU."""
    dtype = torch.bfloat16 if options.on_gpu else None
    inputs = batches(count + 3, vocabulary, shape, options.device)
    return Steps(f"{workload}, {shape[0]} x {shape[1]}", inputs, shape[0] * shape[1], options.device, dtype)


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless the fused loss of a model and its gradients are those of all logits."""
    name, ranks = list(cases(options).items())[-1]
    fields = {**sizes(options), **ranks, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = ours(options, **fields)
    (batch,) = batches(1, model.config.vocab_size, (2, 16), options.device)
    made = []
    for has_logits in (False, True):
        model.zero_grad()
        loss = model(**batch, return_logits=has_logits).loss
        loss.backward()
        made.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    check_close(f"the fused loss of {name}", *made, TOLERANCE)


def measure(options: Options) -> Iterator[Row]:
    """Eager steps; compiled ones on a GPU, and where it takes no more than a minute."""
    fields = sizes(options)
    config = GPT2Config(**fields)
    shape = options.pick(full=(64, 512) if options.on_gpu else (4, 256), quick=(2, 128), tiny=(2, 16))
    rounds = options.pick(full=10 if options.on_gpu else 5, quick=3, tiny=2)
    workload = f"GPT-2 small, {config.n_layer} layers: training step"
    contenders = {STOCK: Contender(stock(options, config))}
    for name, ranks in cases(options).items():
        contenders[name] = Contender(ours(options, **fields, **ranks))
    timed = steps(options, workload, config.vocab_size, shape, rounds)
    yield from timed.measure(contenders, STOCK, rounds=rounds)
    if options.size == "full":
        compiled = {
            f"{name}, compiled": Contender(contenders[name].model, compiled=True)
            for name in (STOCK, "dense, fused loss", "qk and ov 32, ffn 192")
        }
        yield from timed.measure(compiled, f"{STOCK}, compiled", rounds=rounds)


THEME = Theme("gpt2_step", check, measure)
