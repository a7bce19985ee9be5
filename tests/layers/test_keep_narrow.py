"""Checkpointing that keeps what is narrow changes memory and time, and nothing else."""

import json
from functools import partial

import pytest
import torch
from family import CHECKPOINTING, gradients
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from gpt2_cases import LM
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training_cases import losses, tiny_model, tiny_trainer
from transformers import BertConfig, BertForMaskedLM

from hf_fnl import FactorizationConfig, FLAMBeTrainingArguments, factorize_
from hf_fnl.layers import FactorizedLinear, keep_narrow

EXACT = {"rtol": 0, "atol": 0}
OPTIONS = {"use_reentrant": False, "context_fn": keep_narrow}


def _factorized_stock():
    torch.manual_seed(0)
    sizes = {"hidden_size": 21, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 34}
    model = BertForMaskedLM(BertConfig(vocab_size=53, **sizes))
    factorize_(model, FactorizationConfig(kinds=("linear",), rank=5, init="default"))
    ids = torch.randint(53, (4, 11))
    return model, {"input_ids": ids, "labels": ids}


MODELS = {
    "gpt2": lambda: (LM.build(LM.family.low["all"], use_cache=False), LM.batch()),
    "factorized-stock-bert": _factorized_stock,
}


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in PRODUCTS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_gradients_are_those_of_plain_training_with_dropout(build):
    model, batch = build()
    model.train()
    found, counts = [], []
    for options in (None, {"use_reentrant": False}, OPTIONS):
        if options:
            getattr(model, f"{CHECKPOINTING}_enable")(options)
        torch.manual_seed(2)
        with Products() as products:
            loss = model(**batch).loss
            found.append((loss.detach(), gradients(model, loss)))
        counts.append(products.count)
    assert_close(found[1], found[0], **EXACT)
    assert_close(found[2], found[0], **EXACT)
    plain, everything_again, the_rest_again = counts
    assert plain < the_rest_again < everything_again


def _narrowing_net():
    torch.manual_seed(0)
    layers = FactorizedLinear(11, 31, 5), torch.nn.GELU(), torch.nn.Dropout(0.3), FactorizedLinear(31, 11, 7)
    return torch.nn.Sequential(*layers)


def test_compiled_too_only_the_widening_half_is_computed_again():
    counts = []

    def count_and_run(graph, inputs):
        counts.append(sum(node.target in PRODUCTS for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    net, x = _narrowing_net(), torch.randn(13, 11, requires_grad=True)
    backend = aot_autograd(fw_compiler=count_and_run, partition_fn=min_cut_rematerialization_partition)
    results = []
    net.eval()  # without dropout, whose random numbers are drawn in another way when compiled
    for step in (net, torch.compile(partial(checkpoint, net, **OPTIONS), backend=backend, fullgraph=True)):
        y = step(x)
        results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *net.parameters()])))
    assert_close(*results)
    assert counts == [4, 8 + 1]  # of the forward pass; for the gradients, and to widen to 31 again


def test_the_trainer_trains_alike_and_its_arguments_can_be_written(tmp_path):
    plain, narrow = (
        tiny_trainer(tmp_path, tiny_model(dropout=0.1), max_steps=3, keep_narrow=on, **{CHECKPOINTING: on})
        for on in (False, True)
    )
    for trainer in (plain, narrow):
        torch.manual_seed(1)
        trainer.train()
    assert narrow.model.bert.encoder.layer[0]._gradient_checkpointing_func.keywords == OPTIONS
    assert losses(narrow) == losses(plain)
    assert_close(dict(narrow.model.named_parameters()), dict(plain.model.named_parameters()), **EXACT)
    written = json.loads(narrow.args.to_json_string())
    read = FLAMBeTrainingArguments(**{**written, "use_cpu": True})
    assert getattr(read, f"{CHECKPOINTING}_kwargs") == OPTIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, f"set {CHECKPOINTING}"),
        ({CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}, "got .*True"),
    ],
    ids=["alone", "reentrant"],
)
def test_options_that_contradict_it_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, keep_narrow=True, **options)
