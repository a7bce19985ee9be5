"""Loading what went through surgery: by any stock class, by name, and with errors that say what is wrong."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
import transformers
from family import no_decompositions
from packaging.version import Version
from safetensors.torch import load_file, save_file
from surgery_cases import ALL_KINDS, ARCHITECTURES
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.quantizers import AutoQuantizationConfig

from hf_fnl import FactorizedBertConfig, FactorizedBertForMaskedLM
from hf_fnl.layers import Factorized, FactorizedLinear
from hf_fnl.models.surgery_loading import load
from hf_fnl.surgery import factorize_
from hf_fnl.surgery.config import FactorizationConfig

EXACT = {"rtol": 0, "atol": 0}
CASE = ARCHITECTURES["roberta"]
LOW = FactorizationConfig(rank=4, kinds=ALL_KINDS, exclude=("*token_type*",))
DRAWS_NOTHING = Version(transformers.__version__) < Version("5.23")  # anew beside a quantization method
LAYER = "roberta.encoder.layer.1.output.dense"


@pytest.fixture
def model() -> PreTrainedModel:
    model = CASE.build()
    factorize_(model, LOW)
    return model


@pytest.fixture
def folder(model: PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


# What comes back


def with_its_own_record(folder: Path) -> PreTrainedModel:
    """As lm-evaluation-harness reads models."""
    record = AutoQuantizationConfig.from_pretrained(folder)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        return AutoModelForMaskedLM.from_pretrained(folder, quantization_config=record)


@pytest.mark.parametrize(
    "read",
    [load, AutoModelForMaskedLM.from_pretrained, lambda d: load(d, AutoModelForMaskedLM), with_its_own_record],
    ids=["load", "auto", "load-by-auto-class", "with-its-own-record"],
)
def test_it_is_the_model_that_was_saved(model, folder, read):
    with no_decompositions():
        loaded = read(folder)
    assert type(loaded) is type(model)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert_close(loaded(**CASE.batch()).logits, model(**CASE.batch()).logits)
    assert [(n, type(m)) for n, m in loaded.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]


def test_it_is_an_ordinary_model(folder, tmp_path):
    loaded = load(folder)
    assert not getattr(loaded, "hf_quantizer", None)
    assert not loaded.is_quantized
    assert not hasattr(loaded, "quantization_method")
    assert not hasattr(loaded.config, "_is_quantized")
    assert loaded.config.quantization_config["quant_method"] == "hf_fnl"
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert {p.dtype for p in loaded.half().float().parameters()} == {torch.float32}
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (folder / "config.json").read_text()
    assert_close(dict(load(tmp_path / "again").state_dict()), dict(loaded.state_dict()), **EXACT)


def test_the_record_is_short_and_readable(folder):
    record = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert record["quant_method"] == "hf_fnl"
    assert record["layers"][LAYER] == {"rank": 4}
    assert record["layers"]["lm_head.decoder"] == {"rank": 4}


def test_dtype_and_shards(model, folder, tmp_path):
    assert {p.dtype for p in load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert_close(dict(load(tmp_path / "shards").state_dict()), dict(model.state_dict()), **EXACT)


def test_a_new_head_on_a_factorized_backbone(model, folder):
    loaded = transformers.RobertaForSequenceClassification.from_pretrained(folder, num_labels=5)
    ours = dict(model.roberta.named_parameters())
    assert_close({n: loaded.roberta.get_parameter(n) for n in ours}, ours, **EXACT)
    assert list(loaded.config.quantization_config["layers"]) == [
        name for name, module in loaded.named_modules() if isinstance(module, Factorized)
    ]


def test_a_backbone_with_a_factorized_embedding_gives_a_head_its_tie(tmp_path):
    backbone = BertModel(transformers.BertConfig(**ARCHITECTURES["bert"].config))
    factorize_(backbone, FactorizationConfig(rank=4, kinds=("embedding",), include=("*word_embeddings",)))
    backbone.save_pretrained(tmp_path)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    decoder = loaded.get_output_embeddings()
    assert isinstance(decoder, FactorizedLinear)
    assert decoder.U is loaded.get_input_embeddings().U
    assert torch.equal(decoder.U, backbone.get_input_embeddings().U)


def test_untied_embeddings_stay_untied(tmp_path):
    model = CASE.build(tie_word_embeddings=False)
    factorize_(model, LOW)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert not torch.equal(loaded.get_output_embeddings().U, loaded.get_input_embeddings().U)


@pytest.mark.parametrize(
    ("name", "side"), [*itertools.product(["bert", "roberta", "gpt2", "opt"], ["input", "output"]), ("t5", "output")]
)
def test_a_dense_embedding_beside_a_factorized_one_that_the_configuration_ties(name, side, tmp_path):
    case = ARCHITECTURES[name]
    model = case.build(**({"word_embed_proj_dim": 21} if name == "opt" else {}))
    factorize_(model, FactorizationConfig(rank=4, kinds=("embedding",), exclude=("*position*", "*type*", "*wpe*")))
    other = getattr(model, f"get_{side}_embeddings")().to_dense()
    nn.init.normal_(other.weight)
    getattr(model, f"set_{side}_embeddings")(other)
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    expected = model(**case.batch())[0]
    for loaded in (load(tmp_path), type(model).from_pretrained(tmp_path)):
        assert_close(loaded(**case.batch())[0], expected)
        loaded.save_pretrained(tmp_path / "again")
        assert_close(load(tmp_path / "again")(**case.batch())[0], expected)


# Other models


def test_load_reads_stock_models_and_models_of_ours(tmp_path):
    stock = CASE.build()
    stock.save_pretrained(tmp_path / "stock")
    assert type(load(tmp_path / "stock")) is type(stock)
    ours = FactorizedBertForMaskedLM(FactorizedBertConfig(**ARCHITECTURES["bert"].config, ffn_rank=3))
    ours.save_pretrained(tmp_path / "ours")
    loaded = load(tmp_path / "ours")
    assert type(loaded) is FactorizedBertForMaskedLM
    assert_close(dict(loaded.state_dict()), dict(ours.state_dict()), **EXACT)


def test_surgery_on_a_model_of_ours_is_read_too(tmp_path):
    ours = FactorizedBertForMaskedLM(FactorizedBertConfig(**ARCHITECTURES["bert"].config, ffn_rank=3))
    factorize_(ours, FactorizationConfig(rank=5, include=("*.transform.dense",)))
    ours.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_close(dict(loaded.state_dict()), dict(ours.state_dict()), **EXACT)
    assert loaded.cls.predictions.transform.dense.rank == 5


# Errors


def test_another_rank_in_the_configuration_is_named(folder):
    edit_config(folder, lambda config: config["quantization_config"]["layers"][LAYER].update(rank=5))
    with pytest.raises(ValueError, match=rf"{LAYER}.U has shape \(21, 4\) in the checkpoint and \(21, 5\)"):
        load(folder)
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|has shape"):
        AutoModelForMaskedLM.from_pretrained(folder)


def test_what_does_not_fit_is_drawn_anew_when_asked(folder):
    edit_config(folder, lambda config: config["quantization_config"]["layers"][LAYER].update(rank=5))
    if DRAWS_NOTHING:
        with pytest.raises(ValueError, match=r"has shape \(21, 4\).* with Transformers from 5.23 on"):
            load(folder, ignore_mismatched_sizes=True)
        return
    torch.manual_seed(0)
    loaded = load(folder, ignore_mismatched_sizes=True)
    layer = loaded.get_submodule(LAYER)
    assert layer.U.shape == (21, 5)
    assert layer.composed().std().item() == pytest.approx(0.02, rel=0.5)


def test_a_head_of_another_number_of_classes_is_drawn_anew_or_refused(tmp_path):
    classifier = RobertaForSequenceClassification(RobertaConfig(**CASE.config, num_labels=3))
    factorize_(classifier, FactorizationConfig(rank=4, include=("*.layer.*",)))
    classifier.save_pretrained(tmp_path)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    if DRAWS_NOTHING:
        with pytest.raises(ValueError, match=r"classifier.out_proj.weight has shape \(3, \d+\) in the checkpoint"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
        return
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    assert len(loaded.classifier.out_proj.weight) == len(loaded.classifier.out_proj.bias) == 5
    assert_close(dict(loaded.roberta.state_dict()), dict(classifier.roberta.state_dict()), **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda layers: layers.pop(LAYER),
            rf"the checkpoint holds {LAYER}.[UV] where the model holds {LAYER}.weight",
            id="dense",
        ),
        pytest.param(lambda layers: layers[LAYER].update(rank=2.0), "rank must be an integer, got 2.0", id="float"),
        pytest.param(lambda layers: layers[LAYER].update(rank=22), r"rank must be in \[1, 21\], got 22", id="rank"),
        pytest.param(lambda layers: layers[LAYER].update(size=3), f"record of {LAYER} .* does not fit", id="unknown"),
    ],
)
def test_a_record_that_is_wrong_is_named(folder, change, message):
    edit_config(folder, lambda config: change(config["quantization_config"]["layers"]))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("read", [load, AutoModelForMaskedLM.from_pretrained], ids=["load", "auto"])
def test_a_dense_weight_where_the_record_has_factors_stays_dense(folder, model, read):
    weights = load_file(folder / "model.safetensors")
    weights[f"{LAYER}.weight"] = weights.pop(f"{LAYER}.U") @ weights.pop(f"{LAYER}.V").mT
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = read(folder)
    assert type(loaded.get_submodule(LAYER)) is nn.Linear
    assert torch.equal(loaded.get_submodule(LAYER).weight, weights[f"{LAYER}.weight"])
    assert LAYER not in loaded.config.quantization_config["layers"]
    assert_close(loaded(**CASE.batch()).logits, model(**CASE.batch()).logits)


def test_missing_things_are_named(folder, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=f"model.safetensors.*{folder}"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=f"{folder} holds no config.json"):
        load(folder)


def test_an_unknown_architecture_asks_for_the_class(folder, model):
    edit_config(folder, lambda config: config.update(architectures=["MyRoberta"]))
    with pytest.raises(ValueError, match=r"names no model class .* but MyRoberta; pass the class as auto_class"):
        load(folder)
    assert_close(dict(load(folder, type(model)).state_dict()), dict(model.state_dict()), **EXACT)


def test_loading_warns_of_nothing(folder, caplog):
    transformers.logging.get_logger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        AutoModel.from_pretrained(folder, add_pooling_layer=False)
        load(folder)
    transformers.logging.get_logger("transformers").propagate = False
    assert not [record for record in caplog.records if "hf_fnl" in record.message or "quantiz" in record.message]
