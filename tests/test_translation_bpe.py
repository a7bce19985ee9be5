"""Joint byte-pair encodings: text comes back, the same text gives the same tokenizer, and models find their tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from translation_cases import phrases, tiny_marian, tiny_tokenizer

from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.tokenization import train_joint_bpe

ROOT = Path(__file__).parents[1]

MOSES = "ich bin &apos;s , sagte er -- das 400-fache !"
ORDINARY = 'Größe: 3,5 kg (ungefähr).  Zwei Leerzeichen "wörtlich".'
TEXTS = [MOSES, ORDINARY] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_joint_bpe(TEXTS, vocab_size=120)


@pytest.mark.parametrize("text", [MOSES, ORDINARY, "er  ist  groß", "a"], ids=["moses", "ordinary", "spaces", "short"])
def test_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("text", "back"),
    [(" erst", "erst"), ("ein▁er", "ein er"), ("日本 ist", " ist"), ("er</s>", "er")],
    ids=["leading space", "U+2581", "unknown characters", "special token"],
)
def test_what_does_not_come_back(tokenizer, text, back):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == back


def test_iwslt_comes_back(shared_data):
    texts = [
        line
        for language in ("de", "en")
        for line in (shared_data / f"iwslt14_de_en/test.{language}").read_text().split("\n")[:1000]
    ]
    tokenizer = train_joint_bpe(texts, vocab_size=1000)
    assert len(tokenizer) == 1000
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True) == texts


def test_saving_beside_a_marian_and_loading(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    tiny_marian(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = phrases()["source"][0]
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text
    assert again.model_max_length == 77
    assert (again.eos_token, again.pad_token, again.unk_token) == ("</s>", "<pad>", "<unk>")
    assert again.convert_tokens_to_ids(["</s>", "<pad>", "<unk>"]) == [0, 1, 2]
    assert set(again(text)) == {"input_ids", "attention_mask"}


def serialized() -> list[str]:
    """Two tokenizers; few characters fit into the smaller one, so that equally rare ones compete."""
    texts = [*embedded_documents()[:9], *(chr(code) * 2 for code in range(0x4E00, 0x4E60))]
    return [train_joint_bpe(texts, vocab_size=size).backend_tokenizer.to_str() for size in (100, 300)]


def test_the_same_text_gives_the_same_tokenizer_in_every_process():
    code = "import json, test_translation_bpe as test; print(json.dumps(test.serialized()))"
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == serialized()


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("one text", {}, TypeError, "texts must be several, .* got a str"),
        (iter(TEXTS), {}, TypeError, "read twice: give a list .*, not a list_iterator"),
        (["", " "], {}, ValueError, "no text to train a tokenizer on"),
        (TEXTS, {"vocab_size": 99}, ValueError, "vocab_size must be at least 100, got 99"),
        (TEXTS, {"min_frequency": 0}, ValueError, "min_frequency must be at least 1, got 0"),
    ],
    ids=["string", "iterator", "blank", "vocab_size", "min_frequency"],
)
def test_bad_input(texts, options, error, message):
    with pytest.raises(error, match=message):
        train_joint_bpe(texts, **options)
