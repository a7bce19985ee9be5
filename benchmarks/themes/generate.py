"""Generation with factorized GPT-2: against the stock class, multiplied out, and against int8 quantization of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.harness.limits import count_flops
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Case, Comparison, Row
from benchmarks.themes.gpt2_step import QK_OV, TINY, TINY_RANKS
from hf_fnl import FactorizedGPT2Config, FactorizedGPT2LMHeadModel
from hf_fnl.layers.linear import dense_weight

STOCK = "stock"
RANKS = {"qkv and ffn 192": {"qkv_rank": 192, "ffn_rank": 192}, "qk and ov 32, ffn 192": QK_OV}


def models(options: Options) -> dict[str, PreTrainedModel]:
    """The stock model, ours, and the last of ours with its products multiplied out."""
    fields = options.pick(full={}, quick={"n_layer": 4}, tiny=TINY)
    fields = {"bos_token_id": 0, "eos_token_id": None, **fields}
    ranks = options.pick(full=RANKS, quick=RANKS, tiny=dict(list(TINY_RANKS.items())[1:]))
    made: dict[str, PreTrainedModel] = {STOCK: GPT2LMHeadModel(GPT2Config(**fields))}
    for name, values in ranks.items():
        made[name] = FactorizedGPT2LMHeadModel(FactorizedGPT2Config(factor_init="default", **fields, **values))
    made[f"{name}, merged"] = made[name].merge()
    if options.on_gpu:
        made = {name: model.bfloat16() for name, model in made.items()}
    return {name: model.to(options.device).eval() for name, model in made.items()}


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose layers hold int8 weights and quantize their inputs as they come.

    Raises:
        ImportError: If torch has no such layers any more, or none for this processor.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, Conv1D):  # torch quantizes its own layers only
                setattr(parent, name, _linear(layer))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will move to torchao
            return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    except (AttributeError, RuntimeError) as error:
        raise ImportError(f"quantize_dynamic: {str(error).partition(chr(10))[0][:120]}") from error


def _linear(layer: Conv1D) -> nn.Linear:
    linear = nn.Linear(layer.nx, layer.nf)
    linear.weight, linear.bias = nn.Parameter(dense_weight(layer).detach().contiguous()), layer.bias
    return linear


def generation(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Case:
    """Greedy, always of the same length."""
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    return lambda: model.generate(**inputs, **lengths, num_beams=1, do_sample=False)


def random_prompt(options: Options, model: PreTrainedModel, sequences: int, length: int) -> Tensor:
    """Token ids without padding."""
    return torch.randint(2, model.config.vocab_size, (sequences, length), device=options.device)


@torch.no_grad()
def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless every model of ours generates the tokens of the stock model that it merges to."""
    if options.on_gpu:
        return  # in bfloat16 the nearest two tokens may change places; the same code is checked on a CPU
    for name, model in models(options).items():
        if isinstance(model, FactorizedGPT2LMHeadModel):
            prompt = random_prompt(options, model, 2, 8)
            tokens = [generation(each, prompt, 8)() for each in (model, model.merge())]
            if not torch.equal(*tokens):
                raise RuntimeError(f"{name}: other tokens than those of the merged model; nothing was timed")


def measure(options: Options) -> Iterator[Row]:
    """One sequence and many."""
    made = models(options)
    prompt, new = options.pick(full=(32, 32), quick=(32, 16), tiny=(4, 3))
    peer, missing = "stock, int8", None
    try:
        if options.on_gpu:
            raise ImportError("quantize_dynamic has kernels for CPUs only")
        made[peer] = quantized(made[STOCK])
    except ImportError as error:
        missing = str(error)
    for sequences in options.pick(full=(1, 32), quick=(1, 32), tiny=(1, 2)):
        workload = f"GPT-2 generates {new} tokens after {prompt}, batch {sequences}"
        if missing:
            yield {"workload": workload, "case": peer, "not_measured": missing}
        yield from _compare(options, workload, made, random_prompt(options, made[STOCK], sequences, prompt), new)


def _compare(
    options: Options, workload: str, made: dict[str, PreTrainedModel], prompt: Tensor, new: int
) -> Iterator[Row]:
    cases = {name: generation(model, prompt, new) for name, model in made.items()}
    rounds = options.pick(full=7, quick=3, tiny=2)
    limits, facts = {}, {}
    flops = {name: count_flops(case) for name, case in cases.items() if "int8" not in name}
    for name, count in flops.items():
        limits[name] = flops[STOCK] / count
        facts[name] = {"parameters": sum(p.numel() for p in made[name].parameters())}
    comparison = Comparison(workload, cases, STOCK, limits=limits, facts=facts)
    for row in comparison.measure(options.device, rounds=rounds, warmup=1):
        yield {**row, "tokens_per_second": len(prompt) * new / row["milliseconds"] * 1e3}


THEME = Theme("generate", check, measure)
