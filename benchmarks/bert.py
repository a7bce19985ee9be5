"""Training steps of factorized BERT against the stock classes: time beside operations, and memory.

python -m benchmarks.bert [--device cpu|cuda] [--quick] [--out DIR]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertModel, PreTrainedModel

from benchmarks.common import count_flops, interleave, parse, write
from benchmarks.memory import peak_bytes
from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining, FactorizedBertModel

BATCH, LENGTH, LABELLED = 8, 128, 0.15
WARMUP = 2
STOCK = "stock"
FULL = {"qk_rank": 64, "ov_rank": 64, "ffn_rank": 768}
LOW = {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 192}
TOLERANCE = 1e-3  # of logits of order one, through 12 layers of float32 whose weights were decomposed

Batch = dict[str, Tensor]
Step = Callable[[PreTrainedModel, Batch], object]


def pretraining_step(model: PreTrainedModel, batch: Batch) -> None:
    """Forward and backward of MLM and NSP."""
    model.zero_grad()
    model(**batch).loss.backward()


def encoder_step(model: PreTrainedModel, batch: Batch) -> None:
    """Forward and backward of the backbone alone."""
    model.zero_grad()
    model(batch["input_ids"]).last_hidden_state.sum().backward()


@dataclass(frozen=True)
class Workload:
    """A step, the stock class that takes it, and fields of the factorized configurations measured against it."""

    name: str
    step: Step
    stock: type[PreTrainedModel]
    ours: type[PreTrainedModel]
    cases: dict[str, dict[str, Any]]
    speedup_goals: dict[str, float] = field(default_factory=dict)
    efficiency_goal: float | None = None

    def models(self, layers: int, device: str) -> dict[str, PreTrainedModel]:
        """The stock model and ours, of BERT-base's sizes; how the weights were drawn does not matter to time."""
        models = {STOCK: self.stock(BertConfig(num_hidden_layers=layers))}
        for name, fields in self.cases.items():
            config = FactorizedBertConfig(num_hidden_layers=layers, factor_init="default", **fields)
            models[name] = self.ours(config)
        return {name: model.to(device).train() for name, model in models.items()}


WORKLOADS = (
    Workload(
        "pretraining step",
        pretraining_step,
        BertForPreTraining,
        FactorizedBertForPreTraining,
        {
            "qk and ov 32, ffn 192, sparse prediction": LOW,
            "qk and ov 32, ffn 192": {**LOW, "sparse_prediction": False},
            "dense, sparse prediction": {},
        },
        speedup_goals={"qk and ov 32, ffn 192, sparse prediction": 3.2},
    ),
    Workload(
        "encoder",
        encoder_step,
        BertModel,
        FactorizedBertModel,
        {
            "ffn 512": {"ffn_rank": 512},
            "qk and ov 32, ffn 304 (half)": {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 304},
            "qk and ov 32, ffn 192": LOW,
            "qk and ov 16, ffn 152 (a quarter)": {"qk_rank": 16, "ov_rank": 16, "ffn_rank": 152},
        },
        efficiency_goal=0.85,
    ),
)


def draw_batches(count: int, device: str) -> Iterator[Batch]:
    """Random token ids, of which 15 % are to be predicted, and labels of sentence pairs."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        ids = torch.randint(1, BertConfig().vocab_size, (BATCH, LENGTH), generator=generator)
        labelled = torch.rand(ids.shape, generator=generator) < LABELLED
        pairs = torch.randint(2, (BATCH,), generator=generator)
        batch = {"input_ids": ids, "labels": ids.where(labelled, -100), "next_sentence_label": pairs}
        yield {name: value.to(device) for name, value in batch.items()}


def check_full_rank(layers: int, device: str) -> None:
    """Raise a ``RuntimeError`` unless the model of full rank computes what the stock model of the same seed does."""
    outputs = []
    (batch,) = draw_batches(1, device)
    for model_class, config in (
        (BertForPreTraining, BertConfig(num_hidden_layers=layers)),
        (FactorizedBertForPreTraining, FactorizedBertConfig(num_hidden_layers=layers, **FULL)),
    ):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(model_class(config).to(device).eval()(**batch))
    expected, actual = outputs
    error = max((expected[key] - actual[key]).abs().max().item() for key in ("loss", "prediction_logits"))
    if not error < TOLERANCE:
        raise RuntimeError(f"the model of full rank is {error:.1e} from the stock model; nothing was timed")


def time_steps(models: dict[str, PreTrainedModel], step: Step, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of a step of every model, side by side; every round has a batch of its own, the same for all models."""
    batches = list(draw_batches(WARMUP + rounds, device))

    def case(model: PreTrainedModel) -> Callable[[], object]:
        upcoming = iter(batches)
        return lambda: step(model, next(upcoming))

    return interleave({name: case(model) for name, model in models.items()}, rounds=rounds, warmup=WARMUP)


def peak_memory(model: PreTrainedModel, step: Step, batch: Batch) -> int:
    """Bytes at the peak of a step: parameters, gradients, activations."""
    model.zero_grad()
    return peak_bytes(lambda: step(model, batch), list(model.parameters()))


def measure(workload: Workload, layers: int, rounds: int, device: str) -> list[dict[str, Any]]:
    """Rows of a workload: times and their ratios, beside the ratios of operations and of peak memory."""
    models = workload.models(layers, device)
    (batch,) = draw_batches(1, device)
    flops = {name: count_flops(model, workload.step, batch) for name, model in models.items()}
    memory = {name: peak_memory(model, workload.step, batch) for name, model in models.items()}
    for model in models.values():
        model.zero_grad()
    seconds = time_steps(models, workload.step, rounds, device)

    def row(name: str) -> dict[str, Any]:
        speedup = median(stock / ours for stock, ours in zip(seconds[STOCK], seconds[name], strict=True))
        fewer_flops = flops[STOCK] / flops[name]
        return {
            "workload": workload.name,
            "model": name,
            "encoder_parameters": sum(p.numel() for p in models[name].base_model.encoder.parameters()),
            "seconds": median(seconds[name]),
            "speedup": speedup,
            "speedup_goal": workload.speedup_goals.get(name),
            "fewer_flops": fewer_flops,
            "speedup_per_fewer_flops": speedup / fewer_flops,
            "per_flops_goal": workload.efficiency_goal if name != STOCK else None,
            "peak_megabytes": memory[name] / 2**20,
            "memory_ratio": memory[name] / memory[STOCK],
        }

    return [row(name) for name in models]


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Parse, measure, write; returns the rows."""
    args = parse("bert", __doc__, "two layers in place of twelve, three rounds", argv)
    layers, rounds = (2, 3) if args.quick else (12, 7)
    check_full_rank(layers, args.device)
    rows = [row for workload in WORKLOADS for row in measure(workload, layers, rounds, args.device)]
    write("bert", args.device, rows, args.command, args.out)
    return rows


if __name__ == "__main__":
    main()
