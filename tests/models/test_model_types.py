"""The Auto classes read the configuration of every family, as it was written, and the tokenizer beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
from bert_cases import BERT
from family import Family
from gpt2_cases import GPT2
from llama_cases import LLAMA
from marian_cases import MARIAN
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, GPT2Tokenizer

from hf_fnl import load
from hf_fnl.tasks.tokenization import train_byte_bpe

WORDS = ["<|endoftext|>", "l", "o", "w", "lo", "low"]
FIELDS: dict[str, tuple[Family, dict[str, Any]]] = {
    "bert": (BERT, {**BERT.low["all"], "factor_init": "default", "sparse_prediction": False}),
    "gpt2": (GPT2, {"qkv_rank": [11, None], "factor_init": {"ov": "spectral", "linear:cross": "spectral_ones"}}),
    "llama": (LLAMA, LLAMA.low["all"]),
    "marian": (MARIAN, {**MARIAN.low["all"], "factor_init": {"ov:cross": "spectral_ones"}, "normalize_before": True}),
}
FILES = {
    "bert": {"vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "low", "##er"])},
    "gpt2": {"vocab.json": json.dumps({w: n for n, w in enumerate(WORDS)}), "merges.txt": "#version: 0.2\nl o\nlo w\n"},
}
ENCODED = {"bert": (BertTokenizer, "Lower low", [2, 5, 6, 5, 3]), "gpt2": (GPT2Tokenizer, "lowlo", [5, 4])}


@pytest.mark.parametrize("name", FIELDS)
def test_auto_classes_know_configuration_and_tokenizer(name: str, tmp_path: Path) -> None:
    family, fields = FIELDS[name]
    config = family.config(**family.sizes, **fields)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is family.config
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert all(getattr(loaded, field) == value for field, value in fields.items())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"factorized_{name}"
    if name not in FILES:
        tokenizer = train_byte_bpe(["low lower"] * 9, vocab_size=260)
        tokenizer.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)("low")["input_ids"] == tokenizer("low")["input_ids"]
        return
    for file, text in FILES[name].items():
        (tmp_path / file).write_text(text)
    tokenizer_class, text, ids = ENCODED[name]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, tokenizer_class)
    assert tokenizer(text)["input_ids"] == ids


def test_a_family_that_nothing_registered_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "factorized_mistral"}))
    with pytest.raises(ValueError, match=r"model type factorized_mistral, which neither .* import the module"):
        load(tmp_path)


def test_llama_has_no_rank_of_queries_and_keys() -> None:
    with pytest.raises(TypeError, match=r"has ov_rank, .* and no qk_rank: under rotary positions"):
        LLAMA.config(qk_rank=3)
    assert LLAMA.config(hidden_size=24, num_attention_heads=6, head_dim=6).dense_head_dim == 6
