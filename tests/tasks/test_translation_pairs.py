"""Sentence pairs from every kind of source, and what is refused."""

from __future__ import annotations

import json
import sys

import datasets
import pytest
from translation_cases import PAIRS

from hf_fnl.tasks import phrases as phrases_module
from hf_fnl.tasks.phrases import SIZES, embedded_phrases
from hf_fnl.tasks.translation import load_pairs

RECORDS = [{"de": german, "en": english} for german, english in PAIRS]
EXPECTED = [{"source": german, "target": english} for german, english in PAIRS]


def write_text_files(folder, split="train", pairs=PAIRS):
    for side, language in enumerate(("de", "en")):
        (folder / f"{split}.{language}").write_bytes("".join(f"{pair[side]}\n" for pair in pairs).encode())
    return [folder / f"{split}.{language}" for language in ("de", "en")]


def as_text_files(folder):
    return write_text_files(folder)


def as_text_folder(folder):
    write_text_files(folder, "valid", PAIRS[:1])
    write_text_files(folder, "tiny.train.de-en")
    return folder


def as_json_columns(folder):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def as_json_translations(folder):
    path = folder / "pairs.json"
    path.write_text(json.dumps([{"id": 1, "translation": record} for record in RECORDS]))
    return str(path)


def as_parquet(folder):
    path = folder / "pairs.parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(path)
    return path


def as_parquet_folder(folder):
    datasets.Dataset.from_list([{"translation": record} for record in RECORDS]).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_list([{"translation": RECORDS[0]}]).to_parquet(folder / "test.parquet")
    return folder


SOURCES = [as_text_files, as_text_folder, as_json_columns, as_json_translations, as_parquet, as_parquet_folder]


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
def test_every_source_gives_the_same_pairs(tmp_path, write):
    assert load_pairs(write(tmp_path)).to_list() == EXPECTED


@pytest.mark.parametrize("write", [as_text_folder, as_json_translations], ids=lambda write: write.__name__)
def test_languages_choose_the_direction(tmp_path, write):
    pairs = load_pairs(write(tmp_path), languages=("en", "de"))
    assert list(pairs["source"]) == [english for _, english in PAIRS]
    assert list(pairs["target"]) == [german for german, _ in PAIRS]


def test_splits_of_folders(tmp_path):
    assert load_pairs(as_text_folder(tmp_path), split="validation").to_list() == EXPECTED[:1]
    other = tmp_path / "parquet"
    other.mkdir()
    assert load_pairs(as_parquet_folder(other), split="test").to_list() == EXPECTED[:1]


def test_a_hub_id_is_asked_of_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, *kwargs.items()))
        return datasets.Dataset.from_list([{"translation": record} for record in RECORDS])

    monkeypatch.setattr("hf_fnl.utils.hub.HfApi.repo_info", lambda *_, **__: None)  # it has one of this name
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_pairs("some/pairs", split="test", name="de-en", limit=2).to_list() == EXPECTED[:2]
    assert asked == [("some/pairs", "de-en", ("split", "test"))]


def test_only_line_feeds_end_a_line(tmp_path):
    odd = [("Ein\u2028Satz", "One\rsen\x0btence"), ("zwei\x85", "two")]
    files = write_text_files(tmp_path, pairs=odd)
    files[0].write_bytes(files[0].read_bytes().replace(b"\n", b"\r\n"))
    assert load_pairs(files).to_list() == [
        {"source": "Ein\u2028Satz", "target": "One\rsen\x0btence"},
        {"source": "zwei", "target": "two"},
    ]


def test_empty_sides_are_refused_or_dropped(tmp_path):
    files = write_text_files(tmp_path, pairs=[PAIRS[0], ("", "Yes"), PAIRS[1], ("Ja", "  ")])
    with pytest.raises(
        ValueError,
        match=r"2 of 4 pairs of .*train.de and .*train.en have an empty side, the first in line 2; set drop_empty",
    ):
        load_pairs(files)
    assert load_pairs(files, drop_empty=True).to_list() == EXPECTED[:2]


def test_iwslt(shared_data):
    pairs = load_pairs(shared_data / "iwslt14_de_en", split="test")
    assert len(pairs) == 6750
    assert pairs[2]["target"] == "and of course , we all share the same adaptive imperatives ."


def unequal(folder):
    files = write_text_files(folder)
    files[1].write_text("Good day .\n")
    return files


def latin_1(folder):
    files = write_text_files(folder)
    files[0].write_bytes("Grüße\n".encode("latin-1"))
    return files


def broken_json(folder):
    (folder / "pairs.json").write_text('[{"de": "Ja", "en": ')
    return folder / "pairs.json"


def broken_parquet(folder):
    (folder / "pairs.parquet").write_bytes(b"PAR1 and no more")
    return folder / "pairs.parquet"


def numbers(folder):
    datasets.Dataset.from_list([{"de": 1, "en": "one"}]).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def only_blank(folder):
    return write_text_files(folder, pairs=[])


BAD = [
    (unequal, {}, r"train.de has 3, .*train.en has 1"),
    (latin_1, {}, r"train.de, line 1, is not UTF-8 text: .* 0xfc"),
    (broken_json, {}, r"cannot read .*pairs.json as json"),
    (broken_parquet, {}, r"cannot read .*pairs.parquet as parquet"),
    (numbers, {}, r"column 'de' of .*pairs.parquet holds .*int64.*, not text"),
    (only_blank, {}, "no sentence pairs in"),
    (as_json_columns, {"languages": ("de", "fr")}, r"no 'fr' in .*: set the languages to two of \['de', 'en'\]"),
    (as_json_translations, {"languages": ("nl", "fr")}, r"no 'nl' and no 'fr' in .*two of \['de', 'en'\]"),
    (as_text_folder, {"languages": ("de", "fr")}, r"one train file of language 'fr' is needed .*found \[\]"),
    (as_text_folder, {"split": "test"}, r"one test file of language 'de' is needed in .*found \[\] among \['tiny"),
    (as_parquet_folder, {"split": "dev"}, r"cannot read the dev split of .*dev"),
    (lambda folder: as_text_files(folder)[0], {}, "train.de is no file of pairs: give .* or two text files"),
    (lambda folder: [*as_text_files(folder), folder], {}, "or two text files of equal length; got 3 paths"),
    (lambda folder: "embedded", {"languages": ("de", "fr")}, r"languages of the embedded phrases are de and en, got"),
    (lambda folder: "embedded", {"split": "dev"}, "must be one of train, validation, test, got 'dev'"),
    (lambda folder: "embedded", {"limit": 0}, "limit must be at least 1 pair or None for all, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "options", "message"), BAD, ids=[message[:28] for _, _, message in BAD])
def test_bad_input_is_named(tmp_path, write, options, message):
    with pytest.raises(ValueError, match=message):
        load_pairs(write(tmp_path), **options)


@pytest.mark.parametrize("source", ["./nowhere.jsonl", ["nowhere.de", "nowhere.en"]], ids=["file", "two files"])
def test_missing_files_are_named(source):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: nowhere"):
        load_pairs(source)


def test_embedded_splits_are_repeatable_disjoint_and_aligned():
    splits = {split: embedded_phrases(split) for split in SIZES}
    for side in ("source", "target"):
        texts = [text for split in splits.values() for text in split[side]]
        assert len(set(texts)) == len(texts) == sum(SIZES.values())
    assert splits["test"] == embedded_phrases("test")
    swapped = embedded_phrases("test", languages=("en", "de"))
    assert (swapped["source"], swapped["target"]) == (splits["test"]["target"], splits["test"]["source"])


def test_the_extra_that_the_phrases_need_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    monkeypatch.setattr(phrases_module, "_phrases", phrases_module._phrases.__wrapped__)
    monkeypatch.setattr(phrases_module, "_number", phrases_module._number.__wrapped__)
    with pytest.raises(ImportError, match=r'made by num2words: pip install "hf_fnl\[tasks\]"'):
        embedded_phrases("test")


def test_embedded_phrases_say_the_same_in_both_languages():
    phrases = embedded_phrases("train")
    months = dict(phrases_module._MONTHS)
    dates = [pair for pair in zip(phrases["source"], phrases["target"], strict=True) if pair[0].startswith("Am ")]
    assert 0.4 < len(dates) / len(phrases["source"]) < 0.6
    for source, target in dates:
        assert f" of {months[source.split()[2]]} " in target
