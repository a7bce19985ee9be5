"""Training steps of factorized BERT: pretraining, the encoder alone, and fine-tuning, against the stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertForQuestionAnswering, BertModel, PreTrainedModel

from benchmarks.harness.steps import Batch, Contender, Steps, check_close
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Goal, Row
from benchmarks.peers.lora import with_lora
from hf_fnl import (
    FactorizedBertConfig,
    FactorizedBertForPreTraining,
    FactorizedBertForQuestionAnswering,
    FactorizedBertModel,
)

LABELLED = 0.15
STOCK, COMPILED = "stock", "stock, compiled"
LOW = {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 192}
HALF = {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 304}
QUARTER = {"qk_rank": 16, "ov_rank": 16, "ffn_rank": 152}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LARGE_LOW = {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 256}
TINY = {"vocab_size": 500, "hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 384}
TINY_LOW = {"qk_rank": 4, "ov_rank": 4, "ffn_rank": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TOLERANCE = 1e-3  # of logits of order one, through 12 layers of float32 whose weights were decomposed


def sizes(options: Options) -> dict[str, Any]:
    """Fields of BERT-base's configuration that are others."""
    return options.pick(full={}, quick={"num_hidden_layers": 2}, tiny=TINY)


def low(options: Options) -> dict[str, Any]:
    """The ranks that keep a third of the encoder's parameters."""
    return options.pick(full=LOW, quick=LOW, tiny=TINY_LOW)


def shape(options: Options) -> tuple[int, int]:
    """Sequences in a batch, and their length."""
    return options.pick(full=(256, 128) if options.on_gpu else (8, 128), quick=(8, 128), tiny=(2, 16))


def stock(kind: type[PreTrainedModel], device: str, **fields: Any) -> PreTrainedModel:
    """A stock model, ready to train."""
    return kind(BertConfig(**fields)).to(device).train()


def ours(kind: type[PreTrainedModel], device: str, **fields: Any) -> PreTrainedModel:
    """A model of ours, ready to train; how its factors were drawn does not matter to time."""
    return kind(FactorizedBertConfig(factor_init="default", **fields)).to(device).train()


def batches(count: int, vocabulary: int, sequences: int, length: int, device: str) -> list[Batch]:
    """Random token ids, of which 15 % are to be predicted, and labels of sentence pairs."""
    made = []
    for _ in range(count):
        ids = torch.randint(1, vocabulary, (sequences, length))
        labelled = torch.rand(ids.shape) < LABELLED
        labelled[0, 0] = True
        pairs = torch.randint(2, (sequences,))
        batch = {"input_ids": ids, "labels": ids.where(labelled, -100), "next_sentence_label": pairs}
        made.append({name: value.to(device) for name, value in batch.items()})
    return made


def pretraining(options: Options, name: str, fields: dict[str, Any], **more: Any) -> Steps:
    """Steps of MLM and NSP."""
    config, (sequences, length) = BertConfig(**fields), shape(options)
    return Steps(
        f"{name}, {sequences} x {length}",
        batches(rounds(options) + 3, config.vocab_size, sequences, length, options.device),
        sequences * length,
        options.device,
        torch.bfloat16 if options.on_gpu else None,
        **more,
    )


def rounds(options: Options) -> int:
    """That are timed."""
    return options.pick(full=15 if options.on_gpu else 7, quick=3, tiny=2)


@torch.no_grad()
def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless the model of full rank computes what the stock model of the same seed does."""
    fields = sizes(options)
    dense = BertConfig(**fields)
    head = dense.hidden_size // dense.num_attention_heads
    full = {"qk_rank": head, "ov_rank": head, "ffn_rank": min(dense.hidden_size, dense.intermediate_size)}
    (batch,) = batches(1, dense.vocab_size, 2, 16, options.device)
    made: list[list[Tensor]] = []
    for model_class, config in (
        (FactorizedBertForPreTraining, FactorizedBertConfig(**fields, **full)),
        (BertForPreTraining, dense),
    ):
        torch.manual_seed(0)
        output = model_class(config).to(options.device).eval()(**batch)
        made.append([output.loss, output.prediction_logits])
    check_close("the model of full rank", *made, TOLERANCE)


def measure(options: Options) -> Iterator[Row]:
    """Pretraining, eager and compiled; the encoder alone; fine-tuning."""
    if options.on_gpu:
        yield from _pretraining_on_gpu(options)
    else:
        yield from _pretraining(options)
        if options.size != "tiny":
            yield from _compiled(options)
    yield from _encoder(options, "encoder")
    if not options.on_gpu:  # where random numbers take as long as some of the products
        yield from _encoder(options, "encoder without dropout", **NO_DROPOUT)
    yield from _fine_tuning(options)


def _pretraining(options: Options) -> Iterator[Row]:
    fields, ranks, device = sizes(options), low(options), options.device
    ours_name = "qk and ov 32, ffn 192, sparse prediction"
    contenders = {
        STOCK: Contender(stock(BertForPreTraining, device, **fields)),
        ours_name: Contender(ours(FactorizedBertForPreTraining, device, **fields, **ranks)),
        "qk and ov 32, ffn 192": Contender(
            ours(FactorizedBertForPreTraining, device, **fields, **ranks, sparse_prediction=False)
        ),
        "dense, sparse prediction": Contender(ours(FactorizedBertForPreTraining, device, **fields)),
    }
    goals = {ours_name: Goal(STOCK, faster=3.2)}
    steps = pretraining(options, "pretraining step", fields, goals=goals)
    yield from steps.measure(contenders, STOCK, rounds=rounds(options))


def _compiled(options: Options) -> Iterator[Row]:
    """One graph for each model; four layers, which compile in a minute and are as typical as twelve."""
    fields, ranks, device = {**sizes(options)}, low(options), options.device
    fields["num_hidden_layers"] = options.pick(full=4, quick=1, tiny=1)
    contenders = {
        COMPILED: Contender(stock(BertForPreTraining, device, **fields), compiled=True),
        "ours, compiled": Contender(ours(FactorizedBertForPreTraining, device, **fields, **ranks), compiled=True),
    }
    steps = pretraining(options, f"pretraining step, {fields['num_hidden_layers']} layers", fields)
    yield from steps.measure(contenders, COMPILED, rounds=rounds(options))


def _pretraining_on_gpu(options: Options) -> Iterator[Row]:
    """BERT-base and BERT-large in bfloat16, where the dense ones fill the GPU."""
    base, device = sizes(options), options.device
    models: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"BERT-base": (base, low(options))}
    if options.size == "full":
        models["BERT-large"] = LARGE, LARGE_LOW
    for name, (fields, ranks) in models.items():
        goals = (0.45, 0.35) if name == "BERT-large" else (None, None)
        dense = ours(FactorizedBertForPreTraining, device, **fields)
        factorized = ours(FactorizedBertForPreTraining, device, **fields, **ranks)
        contenders = {
            COMPILED: Contender(stock(BertForPreTraining, device, **fields), compiled=True),
            "dense, compiled": Contender(dense, compiled=True, utilisation=goals[0]),
            "factorized, compiled": Contender(factorized, compiled=True, utilisation=goals[1]),
        }
        if name == "BERT-base":
            eager = stock(BertForPreTraining, device, **fields)
            contenders = {STOCK: Contender(eager), "factorized": Contender(factorized), **contenders}
        steps = pretraining(options, f"{name} pretraining step in bfloat16", fields)
        yield from steps.measure(contenders, COMPILED, rounds=rounds(options))


def _encoder(options: Options, name: str, **more: float) -> Iterator[Row]:
    """The layers alone: embeddings go in, so that no gradient of a table is made."""
    fields, device, (sequences, length) = {**sizes(options), **more}, options.device, shape(options)
    cases = {"a third: qk and ov 32, ffn 192": low(options)}
    if options.size != "tiny":
        cases = {
            "ffn 512": {"ffn_rank": 512},
            "half: qk and ov 32, ffn 304": HALF,
            **cases,
            "a quarter: qk and ov 16, ffn 152": QUARTER,
        }
    contenders = {STOCK: Contender(stock(BertModel, device, **fields))}
    for case, ranks in cases.items():
        contenders[case] = Contender(ours(FactorizedBertModel, device, **fields, **ranks), share_of_limit=0.85)
    width = contenders[STOCK].model.config.hidden_size
    inputs = [
        {"inputs_embeds": torch.randn(sequences, length, width, device=device)} for _ in range(rounds(options) + 3)
    ]
    steps = Steps(
        f"{name}, {sequences} x {length}",
        inputs,
        sequences * length,
        device,
        torch.bfloat16 if options.on_gpu else None,
        loss=lambda output: output.last_hidden_state.sum(),
    )
    yield from steps.measure(contenders, STOCK, rounds=rounds(options))


def _fine_tuning(options: Options) -> Iterator[Row]:
    """SQuAD's step: every weight of the stock layers, of ours, and adapters of as many parameters as ours have."""
    fields, device, (sequences, length) = sizes(options), options.device, shape(options)
    workload = f"fine-tuning step, {sequences} x {length}"
    models = {
        STOCK: stock(BertForQuestionAnswering, device, **fields),
        "a third": ours(FactorizedBertForQuestionAnswering, device, **fields, **low(options)),
    }
    for model in models.values():
        model.bert.embeddings.requires_grad_(False)
    trained = sum(p.numel() for p in models["a third"].parameters() if p.requires_grad)
    contenders = {name: Contender(model) for name, model in models.items()}
    try:
        contenders["LoRA of PEFT"] = Contender(with_lora(stock(BertForQuestionAnswering, device, **fields), trained))
    except ImportError as error:
        yield {"workload": workload, "case": "LoRA of PEFT", "not_measured": str(error)}
    made = []
    for batch in batches(rounds(options) + 3, BertConfig(**fields).vocab_size, sequences, length, device):
        ends = {f"{end}_positions": torch.randint(length, (sequences,), device=device) for end in ("start", "end")}
        made.append({"input_ids": batch["input_ids"], **ends})
    steps = Steps(workload, made, sequences * length, device, torch.bfloat16 if options.on_gpu else None)
    yield from steps.measure(contenders, STOCK, rounds=rounds(options))


THEME = Theme("bert_step", check, measure)
