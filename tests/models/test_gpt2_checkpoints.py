"""Factorized GPT-2 on disk: its configuration and tokenizer, and checkpoints and sources that do not fit.

Its weights are tested with those of the other families.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from family import Head, run
from gpt2_cases import BACKBONE, CROSS_LM, GPT2, LM, LOW, LOW_QKV, SEQUENCE, SIZES
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from hf_fnl import FactorizedGPT2LMHeadModel, FactorizedGPT2Model, RankRule

EXACT = {"rtol": 0, "atol": 0}


def test_auto_config_and_tokenizer_know_the_model_type(tmp_path: Path) -> None:
    init = {"ov": "spectral", "linear:cross": "spectral_ones"}
    config = GPT2.config(**SIZES, qkv_rank=[11, None], factor_init=init, fused_loss=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is GPT2.config
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.factor_init == init
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "factorized_gpt2"
    words = ["<|endoftext|>", "l", "o", "w", "lo", "low"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w\n")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert tokenizer("lowlo")["input_ids"] == [5, 4]


def config_of(ranks: dict[str, Any]) -> Any:
    return GPT2.config(**SIZES, **ranks)


@pytest.mark.parametrize(
    ("saved", "head", "fields", "message"),
    [
        (LOW, LM, {"qk_rank": 3}, r"c_attn\.bias has shape \(36,\) .* \(24,\) in the model \(and 3 more\)"),
        (LOW, LM, {"ov_rank": None}, r"c_attn\.bias has shape \(36,\) .* \(51,\) in the model"),
        (
            LOW,
            LM,
            {"config": config_of({**LOW, "ffn_rank": None})},
            r"holds .*mlp\.\w+\.V where the model holds .*\.weight",
        ),
        (LOW_QKV, LM, {"config": config_of({"ffn_rank": 8})}, r"c_attn\.V where the model holds .*c_attn\.weight"),
        (LOW_QKV, SEQUENCE, {"config": config_of({})}, r"holds .*\.V where the model holds .*\.weight"),
    ],
    ids=["qk", "dense-ov", "dense-ffn", "dense-qkv", "dense-new-head"],
)
def test_a_checkpoint_of_other_ranks(
    saved: dict[str, int], head: Head, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (BACKBONE if "config" in fields else LM).build(saved).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        head.auto_class.from_pretrained(tmp_path, **fields)
    assert str(tmp_path) in str(error.value)
    assert "ignore_mismatched_sizes" in str(error.value)
    assert head.auto_class.from_pretrained(tmp_path, **fields, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("ranks", [{"qkv_rank": 5}, {"embedding_rank": 13}], ids=str)
def test_a_stock_checkpoint_is_not_cut_silently(ranks: dict[str, int], tmp_path: Path) -> None:
    LM.build_stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit FactorizedGPT2LMHeadModel"):
        FactorizedGPT2LMHeadModel.from_pretrained(tmp_path, config=config_of(ranks))


def test_a_folder_is_as_good_as_a_model_and_a_dense_one_of_ours_as_a_stock_one(tmp_path: Path) -> None:
    stock = LM.build_stock()
    expected = FactorizedGPT2LMHeadModel.from_dense(stock, **LOW)
    stock.save_pretrained(tmp_path / "stock")
    dense = FactorizedGPT2LMHeadModel.from_pretrained(tmp_path / "stock", config=config_of({}))
    for source in (tmp_path / "stock", str(tmp_path / "stock"), dense):
        model = FactorizedGPT2LMHeadModel.from_dense(source, **LOW)
        assert_close(run(model, LM.batch()), run(expected, LM.batch()), rtol=1e-4, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is FactorizedGPT2LMHeadModel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"qkv_rank": 3, "rule": RankRule(ratio=0.5)}, "one of them; got qkv_rank", id="both"),
        pytest.param({"qkv_rank": 3, "qk_rank": 2}, "qk_rank cuts its heads: give one of them", id="two-ways"),
        pytest.param({"mlp_rank": 3}, "FactorizedGPT2Model has the ranks .*qkv_rank.*, got mlp_rank", id="unknown"),
        pytest.param({"rule": RankRule(rank=3), "kinds": ["attn"]}, "any of .*qkv.*, got attn", id="kind"),
        pytest.param({"rule": RankRule(rank=3), "kinds": ["qkv", "ov"]}, "ov_rank cuts its heads", id="two-kinds"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        FactorizedGPT2Model.from_dense(BACKBONE.build_stock(), **options)


def test_only_the_stock_class_is_truncated() -> None:
    with pytest.raises(TypeError, match="FactorizedGPT2Model is made from a GPT2Model, got a GPT2LMHeadModel"):
        FactorizedGPT2Model.from_dense(LM.build_stock(), **LOW)


@pytest.mark.parametrize(
    ("name", "calibrated"), [("wte", False), ("h.1.attn.c_attn", True), ("h.0.crossattention.q_attn", False)]
)
@pytest.mark.parametrize("ranks", [LOW, {**LOW_QKV, "embedding_rank": 13}], ids=["heads", "qkv"])
def test_weights_that_are_not_finite(name: str, ranks: dict[str, int], calibrated: bool) -> None:
    stock = CROSS_LM.build_stock()
    stock.transformer.get_submodule(name).weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or Inf"):
        CROSS_LM.ours.from_dense(stock, **ranks, calibration=CROSS_LM.batch() if calibrated else None)
