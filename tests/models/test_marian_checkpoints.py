"""A checkpoint of factorized Marian comes back bit for bit, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from family import Head, no_decompositions, run, run_double
from marian_cases import BACKBONE, DECODER, HEADS, LOW, MT, PRE_NORM, SEPARATE, SIZES, UNTIED
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from hf_fnl import FactorizedMarianConfig
from hf_fnl.math.spectral import spectral_init

EXACT = {"rtol": 0, "atol": 0}
LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
each_norm = pytest.mark.parametrize("head", [MT, PRE_NORM], ids=["post-norm", "pre-norm"])


def trained(head: Head, ranks: dict[str, Any], dtype: torch.dtype = torch.float32, **fields: Any):
    """A model none of whose trainable parameters is what it starts as."""
    model = head.build(ranks, **fields).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def positions(model: torch.nn.Module) -> list[torch.Tensor]:
    return [model.base_model.get_submodule(f"{part}.embed_positions").weight for part in ("encoder", "decoder")]


# Saved and loaded


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [LOW, {"ov_rank": 3}], ids=["all", "only-ov"])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_head_comes_back_bitwise(head: Head, dtype: torch.dtype, ranks: dict[str, int], tmp_path: Path) -> None:
    model = trained(head, ranks, dtype)
    if head.name == "MTModel":
        model.final_logits_bias.normal_()
    model.save_pretrained(tmp_path)
    with no_decompositions():
        loaded, info = head.auto_class.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(loaded) is head.ours
    assert not any(info[problem] for problem in LOADING_PROBLEMS), info
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), **EXACT)
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in head.batch().items()}
    assert_close(run_double(loaded, batch), run_double(model, batch))
    assert {n for n, p in loaded.named_parameters() if not p.requires_grad} == {
        n for n, p in model.named_parameters() if not p.requires_grad
    }


@each_norm
def test_positions_are_computed_and_neither_saved_nor_trained(head: Head, tmp_path: Path) -> None:
    model = trained(head, LOW)
    expected = MarianSinusoidalPositionalEmbedding(40, SIZES["d_model"]).create_weight()
    model.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    for weight in (*positions(model), *positions(loaded)):
        assert torch.equal(weight, expected)
        assert not weight.requires_grad
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        kept = {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(weights.keys()) == {*kept, "final_logits_bias"}


@pytest.mark.parametrize("head", [MT, SEPARATE, UNTIED], ids=["shared", "separate", "untied"])
def test_ties_hold_after_loading(head: Head, tmp_path: Path) -> None:
    model = trained(head, LOW)
    model.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if name.endswith((".U", ".V"))]
    for first in names:
        for second in names:
            tied = model.get_parameter(first) is model.get_parameter(second)
            assert (loaded.get_parameter(first) is loaded.get_parameter(second)) == tied


@pytest.mark.parametrize("method", ["spectral", "spectral_ones", "default"])
@each_head
@pytest.mark.usefixtures("poisoned_memory")
def test_construction_leaves_no_memory_uninitialized(head: Head, method: str) -> None:
    model = head.build(LOW, factor_init=method)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.isfinite(tensor).all(), name


@each_head
def test_construction_on_the_meta_device_decomposes_nothing(head: Head) -> None:
    with no_decompositions(), torch.device("meta"):
        model = head.build(LOW)
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: parameter.shape for name, parameter in head.build(LOW).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes


def test_a_shared_table_is_decomposed_once() -> None:
    with mock.patch("hf_fnl.layers.embedding.spectral_init", autospec=True, side_effect=spectral_init) as split:
        MT.build({"embedding_rank": 13})
    assert split.call_count == 1


def test_the_decoder_of_a_translation_checkpoint(tmp_path: Path) -> None:
    model = trained(MT, {"qk_rank": [1, 2, 3, 4, 5], "ov_rank": 2}, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    decoder = DECODER.auto_class.from_pretrained(tmp_path)
    assert decoder.config.qk_rank == [3, 4, 5]
    assert_close(dict(decoder.model.decoder.state_dict()), dict(model.model.decoder.state_dict()), **EXACT)
    assert torch.equal(decoder.lm_head.weight, model.lm_head.weight)


def test_a_stock_checkpoint_loads_where_nothing_is_factorized(tmp_path: Path) -> None:
    stock = MT.build_stock()
    stock.save_pretrained(tmp_path)
    loaded, info = MT.ours.from_pretrained(tmp_path, config=FactorizedMarianConfig(**SIZES), output_loading_info=True)
    assert not info["missing_keys"]
    assert_close(run_double(loaded, MT.batch()), run_double(stock, MT.batch()))


def test_auto_classes_know_configuration_and_tokenizer(tmp_path: Path) -> None:
    fields = {"factor_init": {"linear": "spectral", "ov:cross": "spectral_ones"}, "normalize_before": True}
    config = FactorizedMarianConfig(**SIZES, **LOW, **fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is FactorizedMarianConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "factorized_marian"
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "</s>": 2, "Hallo": 3, "Welt": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer("Hallo Welt neu")["input_ids"] == [3, 4, 1]


# What does not fit


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"qk_rank": 0}, r"qk_rank must be at least 1 .*got 0"),
        ({"qk_rank": 8}, r"qk_rank must be in \[1, 7\], got 8"),
        ({"ov_rank": [1, 2, 3, 4, 8]}, r"ov_rank must be in \[1, 7\], got 8"),
        ({"ov_rank": [1, 2, 3]}, r"ov_rank needs a number or one for each of 5 layers, got 3"),
        ({"qk_rank": [1, 2], "is_encoder_decoder": False}, r"qk_rank needs .* each of 3 layers, got 2"),
        ({"ffn_rank": 22}, r"ffn_rank must be in \[1, 21\], got 22"),
        ({"decoder_ffn_dim": 5, "ffn_rank": 6}, r"ffn_rank must be in \[1, 5\], got 6"),
        ({"decoder_vocab_size": 15, "embedding_rank": 16}, r"embedding_rank must be in \[1, 15\], got 16"),
        ({"encoder_attention_heads": 7}, "encoder_attention_heads and decoder_attention_heads .* got 7 and 3"),
        ({"d_model": 22}, "must be a multiple of num_attention_heads, got 22 and 3 heads"),
        ({"factor_init": "random"}, "one of spectral, spectral_ones, default, he, got 'random'"),
        ({"factor_init": {"ov:head": "spectral"}}, "got 'ov:head'"),
        ({"factor_init": {"ov:cross": "random"}}, "got 'random'"),
        ({"normalize_before": "yes"}, "'normalize_before' expected bool"),
        (
            {"normalize_before": True, "share_encoder_decoder_embeddings": False},
            "normalize_before=True needs share_encoder_decoder_embeddings=True",
        ),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_does_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        FactorizedMarianConfig(**{**SIZES, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ffn_rank": 7}, r"layers\.0\.fc1\.U has shape \(26, 8\) in the checkpoint and \(26, 7\) in the model"),
        ({"qk_rank": 3}, r"k_proj\.bias has shape \(15,\) in the checkpoint and \(9,\) in the model"),
        ({"embedding_rank": 12}, r"shared\.U has shape \(53, 13\) in the checkpoint and \(53, 12\)"),
    ],
    ids=["ffn", "qk", "embedding"],
)
def test_a_checkpoint_of_another_configuration(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    MT.build(LOW).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MT.auto_class.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize("head", [BACKBONE, MT, PRE_NORM, SEPARATE], ids=["backbone", "mt", "pre-norm", "separate"])
def test_a_factorized_embedding_is_not_resized(head: Head) -> None:
    with pytest.raises(ValueError, match="embedding_rank=None"):
        head.build(LOW).resize_token_embeddings(60)


def test_a_factorized_embedding_of_the_decoder_is_not_resized() -> None:
    with pytest.raises(TypeError, match="FactorizedEmbedding"):  # as Transformers says it
        SEPARATE.build(LOW).resize_decoder_token_embeddings(60)


@pytest.mark.parametrize("size", [60, 50], ids=["more", "fewer"])
@each_norm
def test_a_dense_embedding_is_resized_with_all_that_share_it(head: Head, size: int, tmp_path: Path) -> None:
    model = head.build({**LOW, "embedding_rank": None})
    model.resize_token_embeddings(size, mean_resizing=False)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (size, size)
    model.save_pretrained(tmp_path)
    loaded = head.auto_class.from_pretrained(tmp_path)
    batch = {name: value.clamp(max=size - 1) for name, value in head.batch().items()}
    assert run(loaded, batch)["logits"].shape[-1] == size
    assert_close(run_double(loaded, batch), run_double(model, batch))


def test_separate_embeddings_are_resized_apart() -> None:
    model = SEPARATE.build({**LOW, "embedding_rank": None})
    model.resize_token_embeddings(60, mean_resizing=False)
    model.resize_decoder_token_embeddings(55)
    assert (model.config.vocab_size, model.config.decoder_vocab_size) == (60, 55)
    assert run(model, SEPARATE.batch())["logits"].shape[-1] == 55
