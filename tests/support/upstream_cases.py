"""Transformers' own tests, from its source, and what they run on: small models of every family, stock and ours."""

import importlib
import os
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

import hf_fnl

PACKAGE = "transformers_source"  # the name under which its tests are imported: "tests" are ours
# What the common tests take from files that the source on PyPI lacks, and what stands for it where it is missing:
# mixins without tests.
MISSING: dict[str, tuple[str, Any]] = {
    "exporters.test_export": ("ExportTesterMixin", type("ExportTesterMixin", (), {})),
    "generation.test_utils": ("GenerationTesterMixin", type("GenerationTesterMixin", (), {})),
}


def source() -> Path | None:
    """The unpacked source of the installed Transformers: ``$TRANSFORMERS_SOURCE``, or a folder beside this project."""
    beside = Path(__file__).parents[3] / f"transformers-{transformers.__version__}"
    folder = Path(os.environ.get("TRANSFORMERS_SOURCE", beside))
    return folder if (folder / "tests" / "test_modeling_common.py").is_file() else None


def has_checkout() -> bool:
    """Whether the source is a checkout, with the tests of configurations and generation, and not what PyPI has."""
    return Path(f"{source()}", "tests", "__init__.py").is_file()


def upstream(file: str, name: str) -> Any:
    """Something that a file below the ``tests`` of the source defines."""
    if PACKAGE not in sys.modules:
        tests = f"{source()}/tests"
        _add_module(PACKAGE, [tests])
        for missing, (attribute, stand_in) in MISSING.items():
            folder, _, stem = missing.partition(".")
            if not Path(tests, folder, f"{stem}.py").is_file():
                _add_module(f"{PACKAGE}.{folder}", [f"{tests}/{folder}"])
                setattr(_add_module(f"{PACKAGE}.{missing}", []), attribute, stand_in)
    return getattr(importlib.import_module(f"{PACKAGE}.{file}"), name)


def _add_module(name: str, path: list[str]) -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = path
    return module


@dataclass(frozen=True)
class Suite:
    """Model classes that are tested alike.

    Args:
        classes: The classes.
        fields: Of their configuration: small sizes, and ranks.
        facts: What the tests ask about the classes.
    """

    classes: tuple[type[PreTrainedModel], ...]
    fields: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


class ModelTester:
    """What the tests ask for configurations and inputs."""

    is_training = True
    batch_size, seq_length, num_choices, image_size = 5, 7, 3, 20
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, suite: Suite) -> None:
        self.suite = suite

    def get_config(self) -> PreTrainedConfig:
        """A new configuration."""
        return self.suite.classes[0].config_class(**self.suite.fields)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        """A new configuration, and what a model of it is given."""
        config = self.get_config()
        if self.suite.classes[0].main_input_name == "pixel_values":
            return config, {"pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size)}
        inputs = {"input_ids": self._ids(config), "attention_mask": torch.ones(self.batch_size, self.seq_length).long()}
        if config.is_encoder_decoder:
            inputs |= {"decoder_input_ids": self._ids(config), "decoder_attention_mask": inputs["attention_mask"]}
        return config, inputs

    def _ids(self, config: PreTrainedConfig) -> Tensor:
        return torch.randint(5, config.vocab_size, (self.batch_size, self.seq_length))


def more_labels(model: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What classes that Transformers tests in files of their own are trained with, by the name of the class."""
    if model == "BertForPreTraining":
        zeros = torch.zeros_like(inputs["input_ids"])
        return {"labels": zeros, "next_sentence_label": zeros[:, 0]}
    if model == "GPT2DoubleHeadsModel":
        zeros = torch.zeros_like(inputs["input_ids"]).unsqueeze(1).repeat(1, ModelTester.num_choices, 1)
        choices = {"input_ids": zeros + 5, "attention_mask": zeros + 1, "labels": zeros}
        return choices | {"mc_token_ids": zeros[..., 0], "mc_labels": zeros[:, 0, 0]}
    return {}


def _with_name_of(stock: type[PreTrainedModel], ours: str) -> type[PreTrainedModel]:
    """A class of ours with the name of a stock one, by which the tests decide what it is fed and what applies to it."""
    return type(stock.__name__, (getattr(hf_fnl, ours),), {})


def _suites() -> dict[str, Suite]:
    suites = {}
    for family, (heads, sizes, settings, facts) in _TEXT.items():
        stock = tuple(getattr(transformers, f"{family}{head}") for head in heads)
        ours = tuple(_with_name_of(model, f"Factorized{model.__name__}") for model in stock)
        suites[f"{family}-stock"] = Suite(stock, sizes, facts)
        for name, ranks in settings.items():
            suites[f"{family}-{name}"] = Suite(ours, {**sizes, **ranks}, facts)
    facts = {"has_attentions": False, "test_resize_embeddings": False}
    heads = ("Model", "ForImageClassification")
    stock = tuple(getattr(transformers, f"ResNet{head}") for head in heads)
    suites["ResNet"] = Suite(stock, _RESNET, facts)
    for family, sizes in _VISION.items():
        named = zip(stock, heads, strict=True)
        suites[family] = Suite(tuple(_with_name_of(model, f"{family}{head}") for model, head in named), sizes, facts)
    return suites


_RANKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "heads": {"qk_rank": 5, "ov_rank": 3},
    "ffn": {"ffn_rank": 11},
    "embedding": {"embedding_rank": 13},
    "all": {"qk_rank": 5, "ov_rank": 3, "ffn_rank": 11, "embedding_rank": 13},
}
_CLASSIFIERS = ("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification")
_TEXT: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]] = {
    "Bert": (
        (
            "Model",
            "ForMaskedLM",
            "LMHeadModel",
            "ForPreTraining",
            "ForMultipleChoice",
            "ForNextSentencePrediction",
            *_CLASSIFIERS,
        ),
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "max_position_embeddings": 64,
        },
        _RANKS,
        {},
    ),
    "GPT2": (
        ("Model", "LMHeadModel", "DoubleHeadsModel", *_CLASSIFIERS),
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 37,
            "n_positions": 64,
            "pad_token_id": 2,
            "bos_token_id": 3,
            "eos_token_id": 4,
        },
        {**_RANKS, "qkv": {"qkv_rank": 17, "ffn_rank": 11}},
        {},
    ),
    "Marian": (
        ("Model", "MTModel"),
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
            "max_position_embeddings": 64,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
        _RANKS,
        {"is_encoder_decoder": True},
    ),
}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "layer_type": "basic"}
_VISION: dict[str, dict[str, Any]] = {
    "CifarResNet": {"depth": 8, "width": 4},
    "VGG": {"depth": 11, "width": 4},
    "WideResNet": {"depth": 10, "width": 4, "widen_factor": 2},
}
SUITES = _suites()
