"""Tokenizers: trained from texts, saved, loaded from whatever lies in a folder; and what bad input gets."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer
from translation_cases import phrases, tiny_marian, tiny_tokenizer

from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.pretraining_examples import Vocabulary
from hf_fnl.tasks.tokenization import (
    BERT_TOKENS,
    END_OF_TEXT,
    load_tokenizer,
    train_byte_bpe,
    train_joint_bpe,
    train_wordpiece,
)

CORPUS = embedded_documents()[:4]
MOSES = "ich bin &apos;s , sagte er -- das 400-fache !"
ORDINARY = 'Größe: 3,5 kg (ungefähr).  Zwei Leerzeichen "wörtlich".'
TRAINERS = {"wordpiece": train_wordpiece, "byte_bpe": train_byte_bpe, "joint_bpe": train_joint_bpe}
each_trainer = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


@each_trainer
def test_the_vocabulary_has_the_size_asked_for_and_survives_saving(train, tmp_path):
    tokenizer = train(CORPUS, vocab_size=500)
    assert len(tokenizer) == 500
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded(CORPUS)["input_ids"] == tokenizer(CORPUS)["input_ids"]
        assert (loaded.special_tokens_map, loaded.model_max_length) == (tokenizer.special_tokens_map, 77)


@each_trainer
@pytest.mark.parametrize("vocab_size", [257, 400])
def test_the_same_texts_give_the_same_tokenizer_every_time(train, vocab_size):
    """Few characters fit in, so that equally rare ones compete, which trainers meet in an order of hashes."""
    texts = [*CORPUS, *(chr(code) * 2 for code in range(0x4E00, 0x4E60))]
    assert len({train(texts, vocab_size=vocab_size).backend_tokenizer.to_str() for _ in range(4)}) == 1


@each_trainer
def test_rows_without_text_change_nothing(train):
    assert train([None, *CORPUS, "", None], vocab_size=500).get_vocab() == train(CORPUS, vocab_size=500).get_vocab()


def test_a_wordpiece_is_berts():
    tokenizer = train_wordpiece(CORPUS, vocab_size=300)
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(BERT_TOKENS)
    assert tokenizer.decode(tokenizer("The NAME", "of it")["input_ids"]) == "[CLS] the name [SEP] of it [SEP]"
    assert tokenizer("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("text", [CORPUS[0], "  two\n\tlines ", "Grüße, 世界 🙂", "\x00\x7f"], ids=str.isascii)
def test_any_text_comes_back_from_bytes(text):
    tokenizer = train_byte_bpe(CORPUS, vocab_size=300)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.eos_token_id) == (END_OF_TEXT, END_OF_TEXT, 0)
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_frequent_tokens_become_one():
    tokenizer = train_byte_bpe(iter(["low lower lowest", None, " "] * 2), vocab_size=400)
    assert tokenizer.tokenize(" lower low low") == ["Ġlower", "Ġlow", "Ġlow"]


@pytest.mark.parametrize(
    ("text", "back"),
    [
        *[(text, text) for text in (MOSES, ORDINARY, "er  ist  groß", "a")],
        *[(" erst", "erst"), ("ein▁er", "ein er"), ("日本 ist", " ist"), ("er</s>", "er")],
    ],
    ids=["moses", "ordinary", "spaces", "short", "leading space", "U+2581", "unknown characters", "special token"],
)
def test_what_comes_back_from_a_joint_encoding(text, back):
    tokenizer = train_joint_bpe([MOSES, ORDINARY] * 3, vocab_size=120)
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == back


def test_iwslt_comes_back(shared_data):
    files = [shared_data / f"iwslt14_de_en/test.{language}" for language in ("de", "en")]
    texts = [line for file in files for line in file.read_text().split("\n")[:300]]
    tokenizer = train_joint_bpe(texts, vocab_size=1000)
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True) == texts


def test_a_joint_encoding_beside_a_marian_is_loaded_with_its_ids(tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_marian(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, text = AutoTokenizer.from_pretrained(tmp_path), phrases()["source"][0]
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.convert_tokens_to_ids(["</s>", "<pad>", "<unk>"]) == [0, 1, 2]
    assert set(again(text)) == {"input_ids", "attention_mask"}


@each_trainer
@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("one text", {}, TypeError, "texts must be several, .* got a str"),
        ([" ", ""], {}, ValueError, "no text to train a tokenizer on"),
        (CORPUS, {"vocab_size": 99}, ValueError, r"vocab_size must be at least (100|257), got 99"),
    ],
    ids=["string", "blank", "vocab_size"],
)
def test_bad_training_input_is_refused(train, texts, options, error, message):
    with pytest.raises(error, match=message):
        train(texts, **options)


@pytest.mark.parametrize("train", [train_wordpiece, train_joint_bpe])
def test_texts_that_can_be_read_once_are_refused(train):
    with pytest.raises(TypeError, match=r"texts are read twice: .* not a list_iterator"):
        train(iter(CORPUS))


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json or tokenizer_config\.json in "):
        load_tokenizer(tmp_path)


def test_pretraining_needs_special_tokens():
    tokenizer = train_wordpiece(CORPUS, vocab_size=100)
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="the tokenizer has no mask_token"):
        Vocabulary.from_tokenizer(tokenizer)
