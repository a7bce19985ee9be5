"""A checkpoint of factorized Marian comes back bit for bit, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family import Head, run, run_double
from marian_cases import BACKBONE, DECODER, LOW, MT, PRE_NORM, SEPARATE, SIZES, UNTIED
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from hf_fnl import FactorizedMarianConfig

EXACT = {"rtol": 0, "atol": 0}
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


def test_the_decoder_of_a_translation_checkpoint(tmp_path: Path) -> None:
    model = trained(MT, {"qk_rank": [1, 2, 3, 4, 5], "ov_rank": 2}, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    decoder = DECODER.auto_class.from_pretrained(tmp_path)
    assert decoder.config.qk_rank == [3, 4, 5]
    assert_close(dict(decoder.model.decoder.state_dict()), dict(model.model.decoder.state_dict()), **EXACT)
    assert torch.equal(decoder.lm_head.weight, model.lm_head.weight)


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
        ({"ov_rank": [1, 2, 3, 4, 8]}, r"ov_rank must be in \[1, 7\], got 8"),
        ({"ov_rank": [1, 2, 3]}, r"ov_rank needs a number or one for each of 5 layers, got 3"),
        ({"qk_rank": [1, 2], "is_encoder_decoder": False}, r"qk_rank needs .* each of 3 layers, got 2"),
        ({"decoder_ffn_dim": 5, "ffn_rank": 6}, r"ffn_rank must be in \[1, 5\], got 6"),
        ({"decoder_vocab_size": 15, "embedding_rank": 16}, r"embedding_rank must be in \[1, 15\], got 16"),
        ({"encoder_attention_heads": 7}, "encoder_attention_heads and decoder_attention_heads .* got 7 and 3"),
        ({"d_model": 22}, "must be a multiple of num_attention_heads, got 22 and 3 heads"),
        ({"factor_init": {"ov:head": "spectral"}}, "got 'ov:head'"),
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
        ({"qk_rank": 3}, r"k_proj\.bias has shape \(15,\) in the checkpoint and \(9,\) in the model"),
        ({"embedding_rank": 12}, r"shared\.U has shape \(53, 13\) in the checkpoint and \(53, 12\)"),
    ],
    ids=["qk", "embedding"],
)
def test_a_checkpoint_of_another_configuration(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    MT.build(LOW).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MT.auto_class.from_pretrained(tmp_path, **fields)


@pytest.mark.parametrize("head", [BACKBONE, SEPARATE], ids=["backbone", "separate"])
def test_a_factorized_embedding_is_not_resized(head: Head) -> None:
    with pytest.raises(ValueError, match="embedding_rank=None"):
        head.build(LOW).resize_token_embeddings(60)


def test_a_factorized_embedding_of_the_decoder_is_not_resized() -> None:
    with pytest.raises(TypeError, match="FactorizedEmbedding"):  # as Transformers says it
        SEPARATE.build(LOW).resize_decoder_token_embeddings(60)


@pytest.mark.parametrize(("head", "size"), [(MT, 60), (PRE_NORM, 50)], ids=["more", "fewer"])
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
