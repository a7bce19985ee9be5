"""Merging multiplies every product out: what remains is a stock model with the same outputs."""

from pathlib import Path

import torch
from family import Head, Ranks, random_vectors_, run
from model_cases import HEADS, each_head_with_ranks, some
from torch.testing import assert_close
from transformers import AutoConfig

from hf_fnl import FactorizationConfig, factorize_

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
RANK_FIELDS = ("qk_rank", "ov_rank", "qkv_rank", "ffn_rank", "embedding_rank", "factor_init", "normalize_before")


@each_head_with_ranks("low")
def test_the_merged_model_is_stock_and_computes_the_same(head: Head, ranks: Ranks, tmp_path: Path) -> None:
    model = random_vectors_(head.build(ranks, attention="eager" if "ffn_rank" in ranks else "sdpa"))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    merged = model.merge()
    assert type(merged) is head.stock
    assert type(merged.config) is head.stock_config
    assert not any(hasattr(merged.config, name) for name in RANK_FIELDS)
    assert not merged.training
    assert_close(run(merged, head.batch()), run(model, head.batch()), **CLOSE)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    ours = {p.data_ptr() for p in model.parameters()}
    assert not ours & {p.data_ptr() for p in merged.parameters()}
    merged.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is head.stock_config
    loaded, info = head.stock.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_close(run(loaded, head.batch()), run(merged, head.batch()), **CLOSE)


@some("bert-masked-lm", "llama-lm")
def test_nothing_of_surgery_on_a_model_of_ours_is_left(head: Head, tmp_path: Path) -> None:
    """Without ``hf_fnl`` Transformers would not know the record in its configuration."""
    model = head.build({"ffn_rank": 5})
    factorize_(model, FactorizationConfig(rank=5, kinds=("embedding",)))
    model.merge().save_pretrained(tmp_path)
    assert "hf_fnl" not in (tmp_path / "config.json").read_text()
    assert_close(run(head.stock.from_pretrained(tmp_path), head.batch()), run(model, head.batch()), **CLOSE)


@some("bert-masked-lm", "gpt2-lm")
def test_merging_keeps_ties_dtype_and_mode(head: Head) -> None:
    merged = head.build(head.family.low["all"]).to(torch.bfloat16).train().merge()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.dtype == torch.bfloat16
    assert merged.training


def test_merging_keeps_the_bias_of_a_decoder_tied() -> None:
    merged = HEADS["bert-masked-lm"].build({"embedding_rank": 13}).merge()
    assert merged.cls.predictions.decoder.bias is merged.cls.predictions.bias


@some("bert-masked-lm", "gpt2-lm")
def test_merging_an_untied_output_matrix_keeps_both(head: Head) -> None:
    model = head.build(head.family.low["all"], tie_word_embeddings=False)
    merged = model.merge()
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    assert_close(run(merged, head.batch()), run(model, head.batch()), **CLOSE)
