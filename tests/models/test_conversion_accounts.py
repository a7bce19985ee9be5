"""A conversion takes every tensor of its source, or names the one that has no place."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from family import Head, random_vectors_, run
from model_cases import some
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from hf_fnl import FactorizedBertForMaskedLM, FactorizedBertForPreTraining, FactorizedGPT2LMHeadModel, load

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.tensor([[3, 7, 9, 4]])
EXACT = {"rtol": 0, "atol": 0}


def bert(cls: type[PreTrainedModel] = transformers.BertForMaskedLM, **fields: object) -> PreTrainedModel:
    """In float64, with no parameter as it starts."""
    torch.manual_seed(0)
    model = cls(transformers.BertConfig(**SIZES, **fields)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize(
    ("ours", "embedding_rank"), [(FactorizedBertForMaskedLM, 16), (FactorizedBertForPreTraining, None)]
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_bert_keeps_the_output_bias_that_it_computes_with(ours, embedding_rank, tied):
    dense = bert(ours.dense_class, tie_word_embeddings=tied)
    model = ours.from_dense(dense, ffn_rank=16, embedding_rank=embedding_rank)
    assert_close(model(IDS)[0], dense(IDS)[0])
    assert_close(model.merge()(IDS)[0], dense(IDS)[0])


def test_an_untied_bert_is_loaded_with_the_bias_that_it_computes_with(tmp_path):
    dense = bert(tie_word_embeddings=False)
    dense.save_pretrained(tmp_path)
    assert_close(FactorizedBertForMaskedLM.from_pretrained(tmp_path)(IDS)[0], dense(IDS)[0])
    ours = FactorizedBertForMaskedLM.from_dense(tmp_path, ffn_rank=16)
    assert_close(ours(IDS)[0], dense(IDS)[0])
    ours.save_pretrained(tmp_path / "ours")
    assert_close(FactorizedBertForMaskedLM.from_pretrained(tmp_path / "ours")(IDS)[0], ours(IDS)[0])


def test_loading_names_a_bias_that_has_no_place(tmp_path):
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=False))
    dense.lm_head = nn.Linear(16, 40)
    dense.save_pretrained(tmp_path)
    message = r"the checkpoint holds lm_head.bias, for which the Linear of the model has no place"
    for read in (FactorizedGPT2LMHeadModel.from_pretrained, load):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


def test_a_tied_bias_that_stands_twice_in_a_checkpoint_is_no_loss(tmp_path):
    dense = bert()
    dense.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_close(FactorizedBertForMaskedLM.from_pretrained(tmp_path)(IDS)[0], dense(IDS)[0])


def add(where: str, name: str, tensor: object) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        module = model.get_submodule(where)
        if isinstance(tensor, nn.Module):
            module.add_module(name, tensor)
        elif isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)

    return change


def untie(model: PreTrainedModel) -> None:
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(torch.randn_like(output.weight))


NO_PLACE = {
    "module": (add("", "extra", nn.Linear(3, 3)), "no place for extra.weight, extra.bias of the BertForMaskedLM"),
    "buffer": (add("bert", "count", torch.ones(2)), "no place for bert.count"),
    "parameter": (add("cls.predictions", "gain", nn.Parameter(torch.ones(2))), "no place for cls.predictions.gain"),
    "in-an-attention": (
        add("bert.encoder.layer.0.attention", "gate", nn.Linear(3, 3, bias=False)),
        "no place for bert.encoder.layer.0.attention.gate.weight",
    ),
    "in-a-factorized-layer": (
        add("bert.encoder.layer.0.output.dense", "scale", torch.ones(2)),
        "no place for bert.encoder.layer.0.output.dense.scale",
    ),
    "another-shape": (
        lambda model: setattr(model.cls.predictions.transform, "dense", nn.Linear(16, 12)),
        r"no place for cls.predictions.transform.dense.weight.*: its own has shape \(16, 16\)",
    ),
    "without-a-bias": (
        lambda model: model.bert.encoder.layer[0].intermediate.dense.register_parameter("bias", None),
        "BertForMaskedLM lacks bert.encoder.layer.0.intermediate.dense.bias",
    ),
    "untied-by-hand": (untie, "as one, which differ in the BertForMaskedLM: set tie_word_embeddings=False"),
}


@pytest.mark.parametrize(("change", "message"), NO_PLACE.values(), ids=NO_PLACE)
def test_a_tensor_without_a_place_is_named_and_the_source_stays(change, message):
    dense = bert()
    change(dense)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=message):
        FactorizedBertForMaskedLM.from_dense(dense, qk_rank=4, ffn_rank=16, embedding_rank=16)
    assert_close(dict(dense.state_dict()), dict(before), **EXACT)


def test_what_is_not_saved_needs_no_place():
    dense = bert()
    dense.register_buffer("scratch", torch.ones(2), persistent=False)
    model = FactorizedBertForMaskedLM.from_dense(dense, ffn_rank=16)
    assert_close(model(IDS)[0], dense(IDS)[0])


def test_a_head_with_a_bias_of_its_own_is_named():
    sizes = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    for tied in (True, False):
        dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=tied))
        dense.lm_head = nn.Linear(16, 40)
        with pytest.raises(ValueError, match=r"no place for lm_head\."):
            FactorizedGPT2LMHeadModel.from_dense(dense, ffn_rank=16)


def test_a_resized_vocabulary_goes_over():
    dense = bert()
    dense.resize_token_embeddings(45, mean_resizing=False)
    assert_close(FactorizedBertForMaskedLM.from_dense(dense, ffn_rank=16)(IDS)[0], dense(IDS)[0])


@some("bert-pretraining", "gpt2-double", "llama-biases", "marian-separate")
def test_every_family_goes_over_untied_too(head: Head) -> None:
    dense = random_vectors_(head.build_source(tie_word_embeddings=False))
    model = head.ours.from_dense(dense, **next(iter(head.family.full.values())))
    assert_close(run(model, head.batch()), run(dense, head.batch()), rtol=1e-4, atol=5e-5)
