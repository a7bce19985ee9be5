"""Models that version 0.1 wrote are read bit for bit.

``git show 57546ad:tests/fixtures_0_1/write.py`` is the script that made them with the code of commit fea37fb.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fixtures_0_1.toy import toy
from safetensors.torch import load_file, load_model
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

import hf_fnl
from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments, merge_, restore_

FIXTURES = Path(__file__).parent / "fixtures_0_1"
TOLERANCES = {
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
}
# Folder, model class, and the Auto class that knows it.
MODELS = {
    "bert-backbone": ("FactorizedBertModel", "AutoModel"),
    "bert-pretraining": ("FactorizedBertForPreTraining", "AutoModelForPreTraining"),
    "bert-pretraining-untied": ("FactorizedBertForPreTraining", "AutoModelForPreTraining"),
    "bert-masked-lm": ("FactorizedBertForMaskedLM", "AutoModelForMaskedLM"),
    "bert-masked-lm-untied": ("FactorizedBertForMaskedLM", "AutoModelForMaskedLM"),
    "bert-question-answering-float64": ("FactorizedBertForQuestionAnswering", "AutoModelForQuestionAnswering"),
    "bert-decoder": ("FactorizedBertLMHeadModel", "AutoModelForCausalLM"),
    "bert-from-dense": ("FactorizedBertForMaskedLM", "AutoModelForMaskedLM"),
    "bert-merged": ("BertForMaskedLM", "AutoModelForMaskedLM"),
    "gpt2-lm": ("FactorizedGPT2LMHeadModel", "AutoModelForCausalLM"),
    "gpt2-lm-qkv": ("FactorizedGPT2LMHeadModel", "AutoModelForCausalLM"),
    "gpt2-lm-cross": ("FactorizedGPT2LMHeadModel", "AutoModelForCausalLM"),
    "gpt2-sequence-bfloat16": ("FactorizedGPT2ForSequenceClassification", "AutoModelForSequenceClassification"),
    "gpt2-from-dense": ("FactorizedGPT2LMHeadModel", "AutoModelForCausalLM"),
    "marian-mt": ("FactorizedMarianMTModel", "AutoModelForSeq2SeqLM"),
    "marian-mt-separate": ("FactorizedMarianMTModel", "AutoModelForSeq2SeqLM"),
    "marian-mt-untied": ("FactorizedMarianMTModel", "AutoModelForSeq2SeqLM"),
    "marian-mt-pre-norm": ("FactorizedMarianMTModel", "AutoModelForSeq2SeqLM"),
    "marian-decoder": ("FactorizedMarianForCausalLM", "AutoModelForCausalLM"),
    "marian-from-dense": ("FactorizedMarianMTModel", "AutoModelForSeq2SeqLM"),
    "cifar-resnet": ("CifarResNetForImageClassification", "AutoModelForImageClassification"),
    "cifar-resnet-spatial": ("CifarResNetForImageClassification", "AutoModelForImageClassification"),
    "cifar-resnet-tucker": ("CifarResNetForImageClassification", "AutoModelForImageClassification"),
    "cifar-resnet-overcomplete": ("CifarResNetForImageClassification", "AutoModelForImageClassification"),
    "vgg-channel": ("VGGForImageClassification", "AutoModelForImageClassification"),
    "wide-resnet-tt": ("WideResNetForImageClassification", "AutoModelForImageClassification"),
    "wide-resnet-overcomplete-deep": ("WideResNetForImageClassification", "AutoModelForImageClassification"),
    "surgery-bert": ("BertForMaskedLM", "AutoModelForMaskedLM"),
    "surgery-gpt2-deep": ("GPT2LMHeadModel", "AutoModelForCausalLM"),
    "surgery-llama": ("LlamaForCausalLM", "AutoModelForCausalLM"),
    "surgery-llama-backbone": ("LlamaModel", "AutoModel"),
    "surgery-llama-merged": ("LlamaForCausalLM", "AutoModelForCausalLM"),
    "surgery-t5": ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    "surgery-resnet": ("ResNetForImageClassification", "AutoModelForImageClassification"),
}
# What version 0.1 held and stored once, by its name here, and the name under which it stored it.
STORED_ONCE = {"cls.predictions.decoder.bias": "cls.predictions.bias"}  # of an untied BERT
each_model = pytest.mark.parametrize("name", MODELS)


def model_class(name: str) -> type[PreTrainedModel]:
    of_ours = getattr(hf_fnl, MODELS[name][0], None)
    return of_ours or getattr(transformers, MODELS[name][0])


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of the weight files of a folder."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def expected(name: str, part: str) -> dict[str, Tensor]:
    """Return the ``inputs`` or the ``outputs`` that version 0.1 stored beside a model."""
    tensors = load_file(FIXTURES / name / "expected.safetensors")
    return {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_bits(state: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Every stored tensor is in a state, under its name, in its type and shape, and with the same bits."""
    assert stored
    assert stored.keys() <= state.keys()
    for name, tensor in stored.items():
        assert (state[name].dtype, state[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(state[name]), bits(tensor)), name


def assert_expected_outputs(model: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        outputs = model(**expected(name, "inputs"))
    for key, value in expected(name, "outputs").items():
        assert_close(outputs[key], value, **TOLERANCES[value.dtype])


def loaded(from_pretrained: Callable[..., Any], folder: Path) -> PreTrainedModel:
    """Return a model into which all tensors of a folder were loaded, bit for bit, and in which nothing was drawn."""
    model, info = from_pretrained(folder, output_loading_info=True)
    stored, missing = stored_weights(folder), info.pop("missing_keys")
    assert {key: list(names) for key, names in info.items() if names} == {}
    assert set(missing) <= STORED_ONCE.keys()
    assert_same_bits(model.state_dict(), stored | {name: stored[STORED_ONCE[name]] for name in missing})
    return model


def test_every_folder_is_read():
    folders = {path.name for path in FIXTURES.iterdir() if path.joinpath("model.safetensors").exists()}
    assert folders | {"surgery-llama"} == {*MODELS, "surgery-toy", "checkpoint-1"}


@each_model
def test_a_model_of_0_1_loads_is_saved_and_loaded_again(name, tmp_path):
    auto_class = getattr(transformers, MODELS[name][1])
    ours = loaded(model_class(name).from_pretrained, FIXTURES / name)
    ours.save_pretrained(tmp_path)
    for way, folder in ((auto_class.from_pretrained, FIXTURES / name), (hf_fnl.load, tmp_path)):
        model = loaded(way, folder)
        assert type(model) is model_class(name)
        assert_same_bits(model.state_dict(), stored_weights(FIXTURES / name))
        assert_expected_outputs(model, name)


@pytest.mark.parametrize(
    "name", ["bert-pretraining", "bert-decoder", "gpt2-lm", "marian-mt", "surgery-llama", "vgg-channel"]
)
def test_its_backbone_loads_alone(name):
    model, info = transformers.AutoModel.from_pretrained(FIXTURES / name, output_loading_info=True)
    assert not info["mismatched_keys"]
    backbone = model_class(name).from_pretrained(FIXTURES / name).base_model
    assert type(model) is type(backbone)
    assert_same_bits(model.state_dict(), backbone.state_dict())


def test_merging_gives_what_0_1_merged():
    bert = hf_fnl.load(FIXTURES / "bert-from-dense").merge()
    llama = hf_fnl.load(FIXTURES / "surgery-llama")
    merge_(llama)
    for merged, name in ((bert, "bert-merged"), (llama, "surgery-llama-merged")):
        stored = stored_weights(FIXTURES / name)
        assert type(merged) is model_class(name)
        assert_close({key: merged.state_dict()[key] for key in stored}, stored, rtol=1e-5, atol=1e-6)
        assert_expected_outputs(merged, name)
        assert "hf_fnl" not in FIXTURES.joinpath(name, "config.json").read_text()


def test_a_record_of_0_1_restores_a_model_of_plain_torch():
    folder = FIXTURES / "surgery-toy"
    model = toy().eval()
    restore_(model, json.loads(folder.joinpath("record.json").read_text()))
    load_model(model, str(folder / "model.safetensors"))
    assert_same_bits(model.state_dict(), stored_weights(folder))
    assert model.head.U is model.embedding.U
    with torch.no_grad():
        assert_close(model(**expected(folder.name, "inputs")), expected(folder.name, "outputs")["scores"])


def test_the_weights_of_a_checkpoint_of_0_1_load():
    model = loaded(transformers.AutoModelForMaskedLM.from_pretrained, FIXTURES / "checkpoint-1")
    assert type(model) is hf_fnl.FactorizedBertForMaskedLM


def test_a_training_of_0_1_is_not_resumed_but_its_weights_may_be_taken(tmp_path):
    checkpoint = shutil.copytree(FIXTURES / "checkpoint-1", tmp_path / "checkpoint-1")
    model = hf_fnl.FactorizedBertForMaskedLM(hf_fnl.FactorizedBertConfig.from_pretrained(checkpoint))
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 2}
    args = FLAMBeTrainingArguments(str(tmp_path), max_steps=2, **options)
    rows = torch.arange(20).view(4, 5)
    trainer = FLAMBeTrainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    with pytest.raises(ValueError, match=r"hf_fnl 0.1 wrote it, .* begin a new one from its weights"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
