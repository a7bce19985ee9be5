"""Configuration and tokenizer of factorized BERT on disk; its weights are tested with those of the other families."""

import json
from pathlib import Path

from bert_cases import LOW, SIZES
from transformers import AutoConfig, AutoTokenizer, BertTokenizer

from hf_fnl import FactorizedBertConfig


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
