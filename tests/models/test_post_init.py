"""`post_init` may be called any number of times, as a subclass with a layer of its own does."""

import copy

import marian_cases
import model_cases
import pytest
import torch
from family import Head
from torch import nn
from torch.testing import assert_close

from hf_fnl import CifarResNetConfig, CifarResNetForImageClassification, FactorizationConfig, factorize_

EXACT = {"rtol": 0, "atol": 0}
NAMES = ("bert-backbone", "bert-pretraining", "bert-sequence", "gpt2-cross-lm", "gpt2-double", "marian-separate")
HEADS = {name: model_cases.HEADS[name] for name in (*NAMES, "marian-pre-norm")}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
WIDTH = 21


def low(head: Head) -> dict:
    return head.family.low["all"]


def trained(model):
    """Parameters that are not what they start as."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def loaded(head, tmp_path):
    trained(head.build(low(head))).save_pretrained(tmp_path)
    return head.ours.from_pretrained(tmp_path)


def truncated_in_place(head, tmp_path):
    model = trained(head.build({}))
    model.factorize_(**low(head))
    return model


ORIGINS = {
    "fresh": lambda head, _: head.build(low(head)),
    "not-tied": lambda head, _: trained(head.build(low(head), tie_word_embeddings=False)),
    "loaded-and-trained": lambda head, folder: trained(loaded(head, folder)),
    "from_dense": lambda head, _: head.ours.from_dense(trained(head.build_stock()), **low(head)),
    "factorize_": truncated_in_place,
}


def has_stock(head: Head) -> bool:
    """Whether it is made from a stock model: a pre-norm Marian is not."""
    return not isinstance(head, marian_cases.PreNormHead)


CASES = {
    f"{name}-{origin}": (head, make)
    for name, head in HEADS.items()
    for origin, make in ORIGINS.items()
    if origin != "from_dense" or has_stock(head)
}


@pytest.mark.parametrize(("head", "make"), CASES.values(), ids=CASES)
def test_nothing_changes_when_it_is_called_again(head, make, tmp_path):
    model = make(head, tmp_path)
    weights, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    ties, names = dict(model.all_tied_weights_keys), [name for name, _ in model.named_parameters()]
    for _ in range(2):
        model.post_init()
    assert_close(model.state_dict(), weights, **EXACT)
    assert list(model.modules()) == modules
    assert model.all_tied_weights_keys == ties
    assert [name for name, _ in model.named_parameters()] == names


def with_layer(base: type) -> type:
    class WithLayer(base):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(WIDTH, 50)
            self.post_init()

    return WithLayer


def is_drawn(layer: nn.Linear, std: float) -> bool:
    return (
        not layer.bias.any() and abs(layer.weight.std().item() / std - 1) < 0.15
    )  # of 1,050 numbers: within five errors


@each_head
def test_a_subclass_with_a_layer_of_its_own(head, tmp_path, poisoned_memory):
    plain = head.build(low(head))
    torch.manual_seed(0)
    model = with_layer(head.ours)(copy.deepcopy(plain.config)).eval()
    std = getattr(model.config, "init_std", None) or model.config.initializer_range
    assert is_drawn(model.extra, std)
    assert_close({n: v for n, v in model.state_dict().items() if "extra" not in n}, plain.state_dict(), **EXACT)
    model.save_pretrained(tmp_path)
    assert_close(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict(), **EXACT)
    if not has_stock(head):
        return
    truncated = type(model).from_dense(head.build_stock(), **low(head))
    assert is_drawn(truncated.extra, std)
    expected = head.ours.from_dense(head.build_stock(), **low(head)).state_dict()
    assert_close({n: v for n, v in truncated.state_dict().items() if "extra" not in n}, expected, **EXACT)


def test_layers_that_surgery_put_into_a_class_stay():
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=8, num_labels=3))
    factorize_(model, FactorizationConfig(rank=3, kinds=("conv",)))
    weights, modules = copy.deepcopy(trained(model).state_dict()), list(model.modules())
    model.post_init()
    assert_close(model.state_dict(), weights, **EXACT)
    assert list(model.modules()) == modules
