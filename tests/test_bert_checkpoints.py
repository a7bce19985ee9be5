"""A checkpoint of factorized BERT comes back bit for bit, for every head, and nothing else is touched on the way."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from bert_cases import BACKBONE, FULL, HEADS, LM_HEADS, LOW, MASKED_LM, PRETRAINING, SEQUENCE, SIZES
from family import Head, run
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer, BertTokenizer

from hf_fnl import FactorizedBertConfig

EXACT = {"rtol": 0, "atol": 0}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that is not initialized holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty_like(torch.ones(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@contextmanager
def no_decompositions() -> Iterator[None]:
    """Every decomposition fails."""
    names = ("svd", "svdvals", "eigh", "eig", "qr", "cholesky")
    with mock.patch.multiple(torch.linalg, **dict.fromkeys(names, mock.Mock(side_effect=AssertionError("decomposed")))):
        yield


def trained(head: Head, ranks: dict[str, int], dtype: torch.dtype = torch.float32, **fields: object):
    """A model none of whose parameters is what it starts as."""
    model = head.build(ranks, **fields).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [LOW, {"ov_rank": 3}], ids=["all", "only-ov"])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_head_comes_back_bitwise(head: Head, dtype: torch.dtype, ranks: dict[str, int], tmp_path: Path) -> None:
    model = trained(head, ranks, dtype)
    model.save_pretrained(tmp_path)
    with no_decompositions():
        loaded, info = head.auto_class.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(loaded) is head.ours
    assert not any(info[problem] for problem in LOADING_PROBLEMS), info
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in head.batch().items()}
    assert_close(run(loaded, batch), run(model, batch), **EXACT)


@pytest.mark.parametrize("head", LM_HEADS.values(), ids=LM_HEADS)
def test_ties_hold_after_loading(head: Head, tmp_path: Path) -> None:
    trained(head, LOW).save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    decoder, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert decoder.U is embedding.U
    assert decoder.V is embedding.V


def test_an_untied_decoder_comes_back_bitwise(tmp_path: Path) -> None:
    model = trained(MASKED_LM, LOW, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = MASKED_LM.auto_class.from_pretrained(tmp_path)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    assert not torch.equal(loaded.get_output_embeddings().U, loaded.get_input_embeddings().U)


def test_only_safetensors_is_written_and_ties_once(tmp_path: Path) -> None:
    model = trained(PRETRAINING, LOW)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == {name for name, _ in model.named_parameters()}


def test_a_checkpoint_in_several_files_comes_back(tmp_path: Path) -> None:
    model = trained(PRETRAINING, LOW)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = PRETRAINING.auto_class.from_pretrained(tmp_path)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)


@each_head
@pytest.mark.parametrize("ranks", [LOW, FULL], ids=["low", "full"])
@pytest.mark.parametrize("method", ["spectral", "spectral_ones", "default"])
@pytest.mark.usefixtures("poisoned_memory")
def test_construction_leaves_no_memory_uninitialized(head: Head, ranks: dict[str, int], method: str) -> None:
    model = head.build(ranks, factor_init=method)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("backbone", "cross-decoder")])
@pytest.mark.usefixtures("poisoned_memory")
def test_a_new_head_on_an_old_backbone(name: str, tmp_path: Path) -> None:
    head = HEADS[name]
    backbone = trained(BACKBONE, LOW)
    backbone.save_pretrained(tmp_path)
    with no_decompositions():
        loaded, info = head.auto_class.from_pretrained(tmp_path, **head.config, output_loading_info=True)
    old = backbone.state_dict()
    assert not info["mismatched_keys"]
    assert all(key.startswith("pooler") for key in info["unexpected_keys"])
    assert not any(key.startswith("bert.") for key in info["missing_keys"])
    assert info["missing_keys"]
    for key, value in loaded.base_model.state_dict().items():
        assert torch.equal(value, old[key]), key
    for key, parameter in loaded.named_parameters():
        assert torch.isfinite(parameter).all(), key


@pytest.mark.usefixtures("poisoned_memory")
def test_pretraining_checkpoint_becomes_a_classifier(tmp_path: Path) -> None:
    model = trained(PRETRAINING, LOW)
    model.save_pretrained(tmp_path)
    loaded, info = SEQUENCE.auto_class.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert_close(dict(loaded.bert.state_dict()), dict(model.bert.state_dict()), **EXACT)
    std = SIZES["initializer_range"]
    assert loaded.classifier.weight.std().item() == pytest.approx(std, rel=0.3)


def test_a_stock_checkpoint_loads_where_nothing_is_factorized(tmp_path: Path) -> None:
    stock = MASKED_LM.build_stock()
    stock.save_pretrained(tmp_path)
    config = FactorizedBertConfig(**SIZES)
    loaded, info = MASKED_LM.ours.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not info["missing_keys"]
    assert_close(run(loaded, MASKED_LM.batch()), run(stock, MASKED_LM.batch()), **EXACT)


@each_head
def test_construction_on_the_meta_device_decomposes_nothing(head: Head) -> None:
    with no_decompositions():
        with pytest.raises(AssertionError, match="decomposed"):
            head.build(LOW)
        with torch.device("meta"):
            model = head.build(LOW)
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: parameter.shape for name, parameter in head.build(LOW).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_auto_config_and_tokenizer_know_the_model_type(tmp_path: Path) -> None:
    config = FactorizedBertConfig(**SIZES, **LOW, factor_init="default", sparse_prediction=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FactorizedBertConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "factorized_bert"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "##er"]))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer("Lower low")["input_ids"] == [2, 5, 6, 5, 3]
