"""One graph and one compilation for batches of every size: losses and gradients are those of the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import bert_cases
import gpt2_cases
import marian_cases
import pytest
import torch
from family import gradients
from torch import Tensor
from torch.testing import assert_close
from training_cases import losses, tiny_model, tiny_trainer
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel

from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.math.vocabulary_loss import vocabulary_loss

SHAPES = (4, 11), (3, 13)  # sequences and their length; coprime, so that none can be taken for another
Batch = dict[str, Tensor]
pytestmark = [  # all of them torch's own, while it compiles
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def text(count: int, length: int) -> Batch:
    ids = torch.randint(3, 50, (count, length))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def masked(count: int, length: int) -> Batch:
    """Another number of labels in every batch."""
    batch = text(count, length)
    is_labelled = torch.arange(length) % 3 == 0
    return {
        **batch,
        "labels": batch["input_ids"].where(is_labelled, -100),
        "next_sentence_label": torch.randint(2, (count,)),
    }


def answers(count: int, length: int) -> Batch:
    return {**text(count, length), **{f"{end}_positions": torch.randint(length, (count,)) for end in ("start", "end")}}


def continued(count: int, length: int) -> Batch:
    batch = text(count, length)
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def translated(count: int, length: int) -> Batch:
    return {**text(count, length), "labels": torch.randint(3, 50, (count, length + 2))}


def after_surgery() -> PreTrainedModel:
    config = BertConfig(**bert_cases.SIZES, **bert_cases.NO_DROPOUT)
    config.num_hidden_layers = 1
    model = BertForQuestionAnswering(config)
    factorize_(model, FactorizationConfig(rank_scale=0.3))
    return model


BERT = {**bert_cases.LOW, **bert_cases.NO_DROPOUT, "num_hidden_layers": 1}
GPT2 = {**gpt2_cases.GPT2.low["all"], **gpt2_cases.NO_DROPOUT, "n_layer": 1}
MARIAN = {**marian_cases.LOW, **marian_cases.NO_DROPOUT, "encoder_layers": 1, "decoder_layers": 1}
CASES: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[int, int], Batch], str]] = {
    # Whose number of labels is found in the batch is traced in both directions, too; elsewhere the graph is enough.
    "bert, labels at some positions": (lambda: bert_cases.PRETRAINING.build(BERT), masked, "aot_eager"),
    "gpt2, fused loss": (lambda: gpt2_cases.LM.build(GPT2), continued, "eager"),
    "marian": (lambda: marian_cases.MT.build(MARIAN), translated, "eager"),
    "stock, factorized": (after_surgery, answers, "eager"),
}


def step(model: PreTrainedModel, called: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
    loss = called(**batch).loss
    return {"loss": loss.detach(), **gradients(model, loss)}


@pytest.mark.parametrize(("build", "batch_of", "backend"), CASES.values(), ids=CASES)
def test_one_compilation_serves_every_size(build, batch_of, backend):
    model = build().train()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=backend)
    for number, shape in enumerate(SHAPES):
        batch = batch_of(*shape)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            found = step(model, compiled, batch)
        assert_close(found, step(model, model, batch))


def test_the_loss_without_logits_is_traced_in_both_directions():
    head = torch.nn.Linear(7, 11)
    parameters = list(head.parameters())

    def loss_of(x: Tensor, labels: Tensor) -> Tensor:
        return vocabulary_loss(x, head.weight, labels, bias=head.bias, chunk_size=5)

    compiled = torch.compile(loss_of, dynamic=True, fullgraph=True, backend="aot_eager")
    for number, count in enumerate((17, 23)):
        batch = torch.randn(count, 7), torch.randint(11, (count,))
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            found = torch.autograd.grad(compiled(*batch), parameters)
        assert_close(found, torch.autograd.grad(loss_of(*batch), parameters))


def test_the_trainer_trains_a_compiled_model_as_a_plain_one(tmp_path):
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = tiny_model()
        del model.bert.encoder.layer[1:]
        trainer = tiny_trainer(tmp_path, model, max_steps=2, **options)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
