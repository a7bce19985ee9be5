"""GPT-2's kind of tokenizer: trained, saved, loaded from what lies in a folder; and what bad input gets."""

import json

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.tokenization import END_OF_TEXT, load_tokenizer, train_byte_bpe

CORPUS = embedded_documents()[:4]


def ids(tokenizer, texts=CORPUS):
    return tokenizer(list(texts))["input_ids"]


@pytest.mark.parametrize("vocab_size", [257, 300, 700])
def test_the_vocabulary_has_the_end_of_text_every_byte_and_the_size_asked_for(vocab_size):
    tokenizer = train_byte_bpe(CORPUS, vocab_size=vocab_size)
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert len(tokenizer) == vocab_size
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.eos_token_id) == (END_OF_TEXT, END_OF_TEXT, 0)
    assert sum(len(token) == 1 for token in tokenizer.get_vocab()) == 256


@pytest.mark.parametrize("text", [CORPUS[0], "  two\n\tlines ", "Grüße, 世界 🙂", "\x00\x7f"], ids=str.isascii)
def test_any_text_comes_back_whole(text):
    tokenizer = train_byte_bpe(CORPUS, vocab_size=300)
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_frequent_pieces_become_one():
    tokenizer = train_byte_bpe(["low lower lowest"] * 2, vocab_size=400)
    assert tokenizer.tokenize(" lower low low") == ["Ġlower", "Ġlow", "Ġlow"]
    assert "Ġlower" not in train_byte_bpe(["low lower lowest"] * 2, vocab_size=400, min_frequency=3).get_vocab()


@pytest.mark.parametrize("vocab_size", [300, 2000])
def test_training_is_deterministic_and_reads_any_iterable(vocab_size):
    first, second = (train_byte_bpe(texts, vocab_size=vocab_size) for texts in (CORPUS, iter([None, *CORPUS, " "])))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_tokenizer_survives_saving(tmp_path):
    tokenizer = train_byte_bpe(CORPUS, vocab_size=500)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is GPT2Tokenizer
        assert (ids(loaded), loaded.eos_token_id) == (ids(tokenizer), 0)


def test_vocabulary_and_merges_are_enough(tmp_path):
    tokenizer = train_byte_bpe(CORPUS, vocab_size=500)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json, .*, vocab\.json with merges\.txt, or vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"]))
    loaded = load_tokenizer(str(tmp_path))
    assert (ids(loaded), loaded.eos_token_id) == (ids(tokenizer), 0)


def test_the_published_vocabulary_loads(shared_data):
    tokenizer = load_tokenizer(shared_data / "vocab" / "gpt2")
    assert (len(tokenizer), tokenizer.eos_token_id) == (50257, 50256)
    assert tokenizer("Hello, world!")["input_ids"] == [15496, 11, 995, 0]


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("one text", {}, TypeError, "texts must be several, .* got a str"),
        ([" ", "", None], {}, ValueError, "no text to train a tokenizer on"),
        (CORPUS, {"vocab_size": 256}, ValueError, "vocab_size must be at least 257, got 256"),
        (CORPUS, {"min_frequency": 0}, ValueError, "min_frequency must be at least 1, got 0"),
    ],
    ids=["string", "empty", "vocab_size", "min_frequency"],
)
def test_bad_training_input_is_refused(texts, options, error, message):
    with pytest.raises(error, match=message):
        train_byte_bpe(texts, **options)
