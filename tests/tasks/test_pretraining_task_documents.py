"""Documents on their way to examples: how they are read, tokenized, paired and packed, and what bad input gets."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from hf_fnl.tasks.documents import load_documents
from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.pretraining_examples import (
    PretrainingOptions,
    Vocabulary,
    make_instances,
    pack_sentences,
    sentence_pairs,
)
from hf_fnl.tasks.pretraining_examples import _truncate as truncate
from hf_fnl.tasks.sentences import Document, split_sentences, tokenize_documents
from hf_fnl.tasks.tokenization import train_wordpiece

TEXTS = ["The first one. It has two sentences.", "A second\none, of two lines.", "The third."]
CORPUS = embedded_documents()[:4]
FULL = PretrainingOptions(short_sequence_probability=0.0)
CLS, SEP, MASK, FIRST_ID = 1, 2, 3, 5
VOCABULARY = Vocabulary(CLS, SEP, MASK, *[np.zeros(0, dtype=int)] * 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # A request to the network, also for local files.
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


def write_txt(path: Path, texts=TEXTS) -> Path:
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def write_gz(path: Path) -> Path:
    path.write_bytes(gzip.compress("\n\n".join(TEXTS).encode()))
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps([{"n": n, "text": text} for n, text in enumerate(TEXTS)]))
    return path


def write_jsonl(path: Path, column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in TEXTS))
    return path


def write_parquet(path: Path) -> Path:
    datasets.Dataset.from_dict({"title": ["a", "b", "c"], "text": TEXTS}).to_parquet(path)
    return path


def write_folder(path: Path) -> Path:
    path.mkdir()
    write_txt(path / "one.txt", TEXTS[:1])
    write_txt(path / "two.txt", TEXTS[1:])
    (path / "notes.pdf").write_bytes(b"no data")
    return path


WRITERS = {
    "docs.txt": write_txt,
    "docs.txt.gz": write_gz,
    "docs.json": write_json,
    "docs.jsonl": write_jsonl,
    "docs.parquet": write_parquet,
    "folder": write_folder,
}


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, name, streaming):
    documents = load_documents(str(WRITERS[name](tmp_path / name)), streaming=streaming)
    assert isinstance(documents, datasets.IterableDataset if streaming else datasets.Dataset)
    assert list(documents) == [{"text": text} for text in TEXTS]


def test_a_list_of_files_is_read_in_its_order(tmp_path):
    files = [write_txt(tmp_path / "b[1].txt", TEXTS[:2]), write_txt(tmp_path / "a*.txt", TEXTS[2:])]
    assert load_documents(files)["text"][:] == TEXTS


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path, streaming):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbfOne.\r\nTwo.\r\n\r\nThree.\r\n")
    documents = load_documents([tmp_path / "a.txt", tmp_path / "b.txt"], streaming=streaming)
    assert [row["text"] for row in documents] == 2 * ["One.\nTwo.", "Three."]


def test_a_folder_keeps_its_splits(tmp_path):
    write_txt(tmp_path / "train.txt", TEXTS[:2])
    (tmp_path / "validation.txt").write_text(" \n = One = \n \n\n\nTwo.\nStill two.\n \nThree")
    assert load_documents(tmp_path, split="train")["text"][:] == TEXTS[:2]
    blank = ["= One =", "Two.\nStill two.", "Three"]  # lines between documents may hold spaces and repeat
    assert load_documents(tmp_path, split="validation")["text"][:] == blank


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_the_text_column_and_the_limit_can_be_chosen(tmp_path, streaming):
    file = write_jsonl(tmp_path / "docs.jsonl", column="body")
    for limit in (2, 7):
        documents = load_documents(file, text_column="body", limit=limit, streaming=streaming)
        assert list(documents) == [{"text": text} for text in TEXTS[:limit]]


def test_wikipedia_is_one_article_a_row(shared_data):
    documents = load_documents(shared_data / "wikipedia", split="validation")
    assert (len(documents), documents.column_names) == (100, ["text"])


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-20])
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


UNREADABLE = {
    "parquet": lambda folder: truncated(write_parquet(folder / "bad.parquet")),
    "jsonl": lambda folder: truncated(write_jsonl(folder / "bad.jsonl")),
    "json": lambda folder: truncated(write_json(folder / "bad.json")),
    "encoding": lambda folder: written(folder / "bad.txt", "café".encode("latin-1")),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_unreadable_file_is_named(tmp_path, kind):
    bad = UNREADABLE[kind](tmp_path)
    with pytest.raises(ValueError, match=f"cannot read .*{bad.name} as ") as caught:
        load_documents(bad)
    assert caught.value.__cause__ is not None


WRONG = {
    "missing file": (lambda d: str(d / "no.parquet"), {}, FileNotFoundError, r"no such file or folder: .*no\.parquet"),
    "missing folder": (lambda d: str(d / "no"), {}, FileNotFoundError, "no such file or folder"),
    "missing in list": (lambda d: [write_txt(d / "a.txt"), d / "b.txt"], {}, FileNotFoundError, r"folder: \S*/b\.txt$"),
    "no files": (lambda d: [], {}, ValueError, "the list of data files is empty"),
    "folder without data": (lambda d: d, {}, ValueError, r"no data file in .*allowed are \.parquet, "),
    "unknown suffix": (lambda d: written(d / "a.docx", b"x"), {}, ValueError, r"unknown kind of data file: .*a\.docx"),
    "mixed kinds": (
        lambda d: [write_txt(d / "a.txt"), write_jsonl(d / "b.jsonl")],
        {},
        ValueError,
        r"of one kind are needed, got \['json', 'text'\]",
    ),
    "zero bytes": (lambda d: written(d / "a.txt", b""), {}, ValueError, r"empty data file: .*a\.txt"),
    "no documents": (lambda d: written(d / "a.txt", b"\n \n\n"), {}, ValueError, r"no documents in .*a\.txt"),
    "missing column": (
        lambda d: write_parquet(d / "a.parquet"),
        {"text_column": "body"},
        ValueError,
        r"no column 'body' in .*a\.parquet; set text_column to one of \['text', 'title'\]",
    ),
    "not text": (
        lambda d: write_json(d / "a.json"),
        {"text_column": "n"},
        ValueError,
        "column 'n' of .* holds int, not text; set text_column",
    ),
    "limit": (lambda d: write_txt(d / "a.txt"), {"limit": 0}, ValueError, "limit must be at least 1 .* got 0"),
    "split": (
        lambda d: write_txt(d / "train.txt").parent,
        {"split": "test"},
        ValueError,
        r"no test split in .*train\.txt",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_sources_are_refused_at_once(tmp_path, case):
    make, options, error, message = WRONG[case]
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(error, match=message):
        load_documents(make(folder), **options)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "No." She left.', ['He said "No."', "She left."]),
        ("Verse one\n\n  verse two \n", ["Verse one", "verse two"]),
        ("By J. S. Bach, e.g. this one. 24 of them.", ["By J. S. Bach, e.g. this one.", "24 of them."]),
        ("Version 3.5 is out.", ["Version 3.5 is out."]),
        ("你好。再见！", ["你好。", "再见！"]),  # noqa: RUF001
        ("  \n ", []),
    ],
    ids=["stops", "quotes", "lines", "abbreviations", "numbers", "chinese", "nothing"],
)
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_documents_are_tokenized_sentence_by_sentence():
    tokenizer = train_wordpiece(CORPUS, vocab_size=300)
    documents = tokenize_documents([CORPUS[0], " ", None, CORPUS[1]], tokenizer)
    assert len(documents) == 2
    for text, (tokens, bounds) in zip(CORPUS, documents, strict=False):
        sentences = np.split(tokens, bounds[1:-1])
        expected = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in split_sentences(text)]
        assert [sentence.tolist() for sentence in sentences] == expected


# Sentence pairs


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbered_documents(*documents: list[int]) -> list[Document]:
    """Documents given by their sentence lengths; their tokens count up from ``FIRST_ID``, so that each is met once."""
    start, made = FIRST_ID, []
    for lengths in documents:
        tokens = np.arange(start, start + sum(lengths), dtype=np.int32)
        made.append(Document(tokens, np.cumsum([0, *lengths])))
        start += sum(lengths)
    return made


def random_documents(count: int, longest: int, seed: int = 0) -> list[Document]:
    rng = generator(seed)
    return numbered_documents(*(rng.integers(1, longest + 1, rng.integers(1, 40)).tolist() for _ in range(count)))


def home(segment: np.ndarray, documents: list[Document]) -> int:
    """The one document that a segment is a stretch of."""
    assert (np.diff(segment) == 1).all()
    (found,) = (number for number, document in enumerate(documents) if set(segment) <= set(document.tokens))
    return found


@pytest.mark.parametrize("max_seq_length", [8, 13, 64])
def test_label_0_follows_and_label_1_comes_from_elsewhere(max_seq_length):
    documents = random_documents(23, longest=7)
    options = replace(FULL, max_seq_length=max_seq_length, short_sequence_probability=0.3)
    seen = set()
    for index in range(len(documents)):
        for a, b, label in sentence_pairs(documents, index, options, generator(index)):
            seen.add(label)
            assert len(a) >= 1
            assert len(b) >= 1
            assert len(a) + len(b) <= max_seq_length - 3
            assert home(a, documents) == index
            assert (home(b, documents) == index) is (label == 0)
            if label == 0 and len(a) + len(b) < max_seq_length - 3:
                assert b[0] == a[-1] + 1
    assert seen == {0, 1}


def test_sentences_replaced_by_random_ones_are_used_again():
    documents = numbered_documents([1] * 301, [1] * 203)
    pairs = list(sentence_pairs(documents, 0, FULL, generator()))
    own = [np.concatenate([a, b]) if label == 0 else a for a, b, label in pairs]
    np.testing.assert_array_equal(np.concatenate(own), documents[0].tokens)


def test_half_of_the_pairs_are_random():
    documents = random_documents(300, longest=5)
    instances = make_instances(documents, replace(FULL, max_seq_length=24), VOCABULARY, generator())
    labels = np.array([instance.next_sentence_label for instance in instances])
    # A document's last sentence, when nothing else is left, can only get a random one: a little above one half.
    assert len(labels) > 1000
    assert 0.5 < labels.mean() < 0.6


@pytest.mark.parametrize(("sentences", "labels"), [([4], []), ([4, 4, 4, 4], [0])], ids=["one", "four"])
def test_a_document_alone_gives_true_pairs_only(sentences, labels):
    documents = numbered_documents(sentences)
    assert [label for *_, label in sentence_pairs(documents, 0, FULL, generator())] == labels


def test_short_sequences_are_as_many_as_asked_for():
    alone = numbered_documents([1] * 126)
    pairs = (next(sentence_pairs(alone, 0, PretrainingOptions(), generator(seed))) for seed in range(1000))
    assert np.mean([len(a) + len(b) < 125 for a, b, _ in pairs]) == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("limit", [5, 6, 125])
def test_truncation_leaves_what_removing_one_token_at_a_time_leaves(limit):
    for len_a, len_b in generator().integers(1, 2 * limit, (50, 2)):
        a, b = np.arange(len_a), np.arange(len_b)
        kept_a, kept_b = truncate(a, b, limit, generator(1))
        while len_a + len_b > limit:
            len_a, len_b = (len_a - 1, len_b) if len_a > len_b else (len_a, len_b - 1)
        assert (len(kept_a), len(kept_b)) == (len_a, len_b)
        assert (np.diff(kept_a) == 1).all()
        assert (np.diff(kept_b) == 1).all()


def test_an_instance_is_laid_out_as_bert_wants_it():
    documents = numbered_documents([3, 4])
    (instance,) = make_instances(documents, FULL, VOCABULARY, generator())
    assert instance.input_ids.tolist() == [CLS, 5, 6, 7, SEP, 8, 9, 10, 11, SEP]
    assert (instance.first_length, instance.next_sentence_label) == (5, 0)


# Packed sentences


@pytest.mark.parametrize("limit", [6, 11, 126])
@pytest.mark.parametrize("longest", [3, 40], ids=["short", "long"])
def test_packing_loses_no_token_and_cuts_no_sentence_that_fits(limit, longest):
    documents = random_documents(31, longest)
    packed = list(pack_sentences(documents, limit, SEP))
    assert max(map(len, packed)) <= limit
    tokens = np.concatenate(packed)
    np.testing.assert_array_equal(tokens[tokens != SEP], np.concatenate([document.tokens for document in documents]))
    sentences = [part for document in documents for part in np.split(document.tokens, document.bounds[1:-1])]
    starts = {part[0] for part in packed}
    inside = {token for part in sentences if len(part) <= limit for token in part[1:]}
    assert starts.isdisjoint(inside)


@pytest.mark.parametrize(
    ("sentences", "limit", "packed"),
    [
        ([[2, 2], [3]], 9, [[5, 6, 7, 8, SEP, 9, 10, 11]]),
        ([[2, 2], [3]], 5, [[5, 6, 7, 8], [9, 10, 11]]),
        ([[2, 2], [3]], 4, [[5, 6, 7, 8], [9, 10, 11]]),
        ([[7]], 5, [[5, 6, 7, 8, 9], [10, 11]]),
        ([[1], [1], [1]], 3, [[5, SEP, 6], [7]]),
        ([], 5, []),
    ],
    ids=["together", "separator last", "separator over", "long sentence", "three", "nothing"],
)
def test_packing_by_hand(sentences, limit, packed):
    assert [part.tolist() for part in pack_sentences(numbered_documents(*sentences), limit, SEP)] == packed
