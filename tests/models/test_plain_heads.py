"""A loss goes around a vocabulary head only where the head is plain: whatever is done to it, training is evaluation."""

from collections.abc import Callable
from typing import Any

import bert_cases
import gpt2_cases
import pytest
import torch
from family import Head
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_fnl.layers import FactorizedLinear
from hf_fnl.models.losses import is_plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT reads it
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # torch's, of inputs without gradients
    pytest.mark.filterwarnings("ignore:.*tie"),  # an adapter on one of two tied matrices is meant here
]

HEADS: dict[str, tuple[Head, dict[str, Any]]] = {
    "gpt2": (gpt2_cases.LM, gpt2_cases.NO_DROPOUT),
    "bert": (bert_cases.MASKED_LM, bert_cases.NO_DROPOUT),
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "factorized-untied": {"embedding_rank": 13, "tie_word_embeddings": False},
}
each_head = pytest.mark.parametrize(("head", "options"), HEADS.values(), ids=HEADS)
each_embedding = pytest.mark.parametrize("embedding", EMBEDDINGS.values(), ids=EMBEDDINGS)


FLOAT32 = {"rtol": 1e-4, "atol": 1e-6, "check_dtype": False}  # in which the stock loss is, whatever the model is in


def build(head: Head, options: dict[str, Any], embedding: dict[str, Any]) -> PreTrainedModel:
    return head.build({}, **options, **embedding).double()


class Replaced(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


def hook(output: Tensor) -> Tensor:
    return output * torch.linspace(0.5, 2, output.shape[-1], dtype=output.dtype)


def replace_head(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    replaced = Replaced(head.in_features, head.out_features).double()
    model.set_output_embeddings(replaced)


def replace_forward(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    forward = head.forward
    head.forward = lambda *args: hook(forward(*args))


def parametrized(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    name = "U" if isinstance(head, FactorizedLinear) else "weight"
    parametrize.register_parametrization(head, name, nn.Tanh())


def pruned(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    prune.l1_unstructured(head, "U" if isinstance(head, FactorizedLinear) else "weight", amount=0.5)


def other_loss(model: PreTrainedModel) -> None:
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "nothing": lambda model: None,
    "hook of the head": lambda model: model.get_output_embeddings().register_forward_hook(lambda m, x, y: hook(y)),
    "pre-hook of the head": lambda model: model.get_output_embeddings().register_forward_pre_hook(
        lambda m, x: (hook(x[0]),)
    ),
    "backward hook of the head": lambda model: model.get_output_embeddings().register_full_backward_hook(
        lambda m, grads, _: (hook(grads[0]),)
    ),
    "backward pre-hook of the head": lambda model: model.get_output_embeddings().register_full_backward_pre_hook(
        lambda m, grads: (hook(grads[0]),)
    ),
    "hook of the embedding": lambda model: model.get_input_embeddings().register_forward_hook(lambda m, x, y: hook(y)),
    "backward hook of the embedding": lambda model: model.get_input_embeddings().register_full_backward_pre_hook(
        lambda m, grads: (hook(grads[0]),)
    ),
    "another class": replace_head,
    "another forward": replace_forward,
    "parametrized": parametrized,
    "pruned": pruned,
    "loss": other_loss,
}


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


@each_head
@each_embedding
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_training_is_evaluation(
    head: Head, options: dict[str, Any], embedding: dict[str, Any], change: Callable[[PreTrainedModel], Any]
) -> None:
    model = build(head, options, embedding)
    change(model)
    results = [loss_and_gradients(model.train(training), head.batch()) for training in (False, True)]
    assert_close(*results, **FLOAT32)


@each_embedding
def test_the_loss_of_a_plain_head_holds_no_logits(embedding: dict[str, Any]) -> None:
    for name, change in CHANGES.items():
        model = build(*HEADS["gpt2"], embedding).train()
        change(model)
        goes_around = name == "nothing" or name.endswith("of the embedding")
        assert (model(**gpt2_cases.LM.batch()).logits is None) == goes_around, name


@each_head
@each_embedding
def test_function_transforms_of_a_whole_model(head: Head, options: dict[str, Any], embedding: dict[str, Any]) -> None:
    model, batch = build(head, options, embedding).train(), head.batch()
    parameters = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (), batch).loss

    gradients = torch.func.grad(loss)(parameters)
    expected = loss_and_gradients(model, batch)
    del expected["loss"]
    assert_close({name: gradients[name] for name in expected}, expected, **FLOAT32)


PLAIN = {
    "linear": lambda: nn.Linear(3, 4),
    "factorized": lambda: FactorizedLinear(3, 4, 2),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_what_is_plain(make: Callable[[], nn.Module]) -> None:
    layer = make()
    assert is_plain(layer)
    assert not is_plain(nn.Embedding(3, 4))
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert not is_plain(layer)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(is_plain(module)))
    torch.func.functional_call(layer, parameters, torch.ones(1, 3))
    assert seen == [False]
