"""A calibrated cut over numbers of tokens: its memory at most, and its time beside one forward pass over the same data.

Each number runs in a process of its own. Memory is what the process held at most, first after a forward pass over all
batches, then after the cut, of a Llama in float32 whose linear layers keep 0.6 of their parameters.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Row
from hf_fnl import FactorizationConfig, factorize_

SHARE = 0.6
GOAL = 3.0  # times one forward pass


def _model(options: Options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    width = options.pick(full=128, quick=128, tiny=16)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=options.pick(full=4, quick=4, tiny=2),
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def _batches(tokens: int, length: int, options: Options) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1024, (tokens // length, length), generator=generator)
    return [{"input_ids": part, "labels": part} for part in ids.split(options.pick(full=8, quick=4, tiny=2))]


def _peak() -> float:
    """What this process held at most so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _cut(tokens: int, length: int, options: Options) -> Row:
    """One row."""
    torch.set_num_threads(1)
    model, batches = _model(options), _batches(tokens, length, options)
    start = time.perf_counter()
    with torch.no_grad():
        for batch in batches:
            model.model(input_ids=batch["input_ids"])
    forward, before = time.perf_counter() - start, _peak()
    start = time.perf_counter()
    linear = sum(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear))
    budget = 1 - (1 - SHARE) * linear / model.num_parameters()
    factorize_(model, FactorizationConfig(budget=budget, include=["model.layers.*"]), calibration=batches)
    seconds = time.perf_counter() - start
    return {
        "workload": "calibrated cut of a Llama",
        "case": f"{tokens:,} tokens",
        "tokens": tokens,
        "seconds": seconds,
        "forward_seconds": forward,
        "times_a_forward_pass": seconds / forward,
        "goal": f"at most {GOAL:g} times",
        "reached": seconds / forward <= GOAL,
        "megabytes_after_forward": before,
        "megabytes": _peak(),
    }


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless batches one by one give the weights that all in one batch give, to rounding."""
    small = Options(options.device, "tiny", options.command, options.out)
    found = []
    for size in (1, 8):
        model = _model(small)
        ids = torch.cat([batch["input_ids"] for batch in _batches(128, 16, small)])
        config = FactorizationConfig(rank=4, include=["model.layers.*"])
        factorize_(model, config, calibration=[{"input_ids": part} for part in ids.split(size)])
        found.append(model(input_ids=ids[:1]).logits)
    if not torch.allclose(*found, rtol=1e-3, atol=1e-4):
        raise RuntimeError("how the calibration data are divided into batches changes the cut; nothing was measured")


def measure(options: Options) -> Iterator[Row]:
    """Rows of growing numbers of tokens."""
    length = options.pick(full=512, quick=256, tiny=16)
    counts = options.pick(full=(2**14, 2**17, 2**20), quick=(2**12, 2**14), tiny=(2**9, 2**10))
    first = None
    for tokens in counts:
        if options.size == "tiny":
            row = _cut(tokens, length, options)
        else:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(_cut, (tokens, length, options))
        first = first or row["megabytes"]
        yield {**row, "of_the_first": row["megabytes"] / first}


THEME = Theme("calibration", check, measure)
