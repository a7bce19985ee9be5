"""Documents in shards: every document in one shard, every example of a shard from every place on."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import chain, islice

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import default_data_collator

from hf_fnl.tasks import pretraining
from hf_fnl.tasks.clm import build_blocks
from hf_fnl.tasks.documents import DocumentOptions, load_document_shards, load_documents
from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.pretraining import PretrainingCollator, build_pretraining_dataset
from hf_fnl.tasks.pretraining_examples import PretrainingOptions
from hf_fnl.tasks.tokenization import train_byte_bpe, train_wordpiece
from hf_fnl.training.stream_loader import StreamLoader
from hf_fnl.training.streaming import Reader

TEXTS = [f"Number {number} begins here. It goes on {'and on ' * (number % 5)}to its end." for number in range(23)]


def lines(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def write_parquet(path, texts):
    pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=5)


WRITERS = {
    "a.txt": lambda path, texts: path.write_text("\n\n".join(texts)),
    "a.jsonl": lambda path, texts: path.write_text(lines(texts)),
    "a.json.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts).encode())),
    "a.parquet": write_parquet,
}


def write(folder, name: str, files: int):
    folder.mkdir()
    for number in range(files):
        WRITERS[name](folder / f"{number}-{name}", TEXTS[number::files])
    return folder


@pytest.fixture(scope="module")
def word_pieces():
    return train_wordpiece(TEXTS, vocab_size=200)


@pytest.fixture(scope="module")
def byte_pairs():
    return train_byte_bpe(TEXTS, vocab_size=300)


@pytest.fixture(params=["pairs", "packed", "blocks", "strided blocks"])
def stream_of(request, word_pieces, byte_pairs, monkeypatch):
    """Makes a stream of examples of documents."""
    monkeypatch.setattr(pretraining, "DOCUMENTS_PER_GROUP", 3)
    if "blocks" in request.param:
        stride = 5 if request.param == "strided blocks" else None
        return lambda documents: build_blocks(documents, byte_pairs, block_size=13, stride=stride)
    options = PretrainingOptions(max_seq_length=24, next_sentence=request.param == "pairs")
    return lambda documents: build_pretraining_dataset(documents, word_pieces, options)


# Documents


@pytest.mark.parametrize("files", [1, 3], ids=["one file", "three files"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_document_is_in_one_shard(tmp_path, name, files):
    for asked in (1, 2, 3, 7):
        shards = load_document_shards(write(tmp_path / str(asked), name, files), shards=asked)
        assert shards.num_shards >= max(asked, files)
        read = [[*shards.texts(shard)] for shard in range(shards.num_shards)]
        assert Counter(chain.from_iterable(read)) == Counter(TEXTS)
        for shard, texts in enumerate(read):
            assert [*islice(shards.texts(shard, start=2), 4)] == texts[2:6]


@pytest.mark.parametrize(("asked", "found"), [(1, 1), (5, 5), (6, 10)])
def test_a_parquet_file_is_divided_into_row_groups(tmp_path, asked, found):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    assert load_document_shards(tmp_path / "a.parquet", shards=asked).num_shards == found


@pytest.mark.parametrize("limit", [1, 9, 40])
def test_the_first_documents_are_the_first_of_all_files(tmp_path, limit):
    source = write(tmp_path / "three", "a.jsonl", 3)
    shards = load_document_shards(source, shards=4, limit=limit)
    first = [row["text"] for row in load_documents(source, limit=limit)]
    assert Counter(chain.from_iterable(map(shards.texts, range(4)))) == Counter(first)


def test_the_embedded_corpus_in_shards():
    shards = load_document_shards("embedded", shards=7)
    assert Counter(chain.from_iterable(map(shards.texts, range(7)))) == Counter(embedded_documents())


def test_the_flags_of_a_script_open_shards():
    assert DocumentOptions(dataset="embedded", stream_shards=5).training(streaming=True).num_shards == 5
    with pytest.raises(ValueError, match="stream_shards must be at least 1, got 0"):
        DocumentOptions(stream_shards=0).training(streaming=True)


# Examples


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_shard_goes_on_behind_every_example(stream_of):
    stream = stream_of(datasets.Dataset.from_dict({"text": [*TEXTS, " ", "Last."]}).to_iterable_dataset())
    whole = list(stream.read(0, 2, stream.start))
    assert len(whole) > 20
    assert len({place for _, place in whole}) == len(whole)
    for number, (_, place) in enumerate(whole):
        rest = list(stream.read(0, 2, place))
        assert [after for _, after in rest] == [after for _, after in whole[number + 1 :]]
        assert all(same(one, two) for (one, _), (two, _) in zip(rest, whole[number + 1 :], strict=True))


def test_other_readers_make_the_same_examples(tmp_path, stream_of):
    documents = load_document_shards(write(tmp_path / "three", "a.jsonl", 3), shards=6)

    def examples(world: int) -> dict:
        readers = (Reader(stream_of(documents), rank=rank, world=world, only_epoch=1) for rank in range(world))
        return {(each.shard, *each.reached): each.example for reader in readers for each in reader}

    one, four = examples(1), examples(4)
    assert one.keys() == four.keys()
    assert all(same(one[place], four[place]) for place in one)


def test_the_blocks_of_all_shards_predict_every_token_once(tmp_path, byte_pairs):
    documents = load_document_shards(write(tmp_path / "three", "a.txt", 3), shards=6)
    predicted = [
        label
        for example in build_blocks(documents, byte_pairs, block_size=13, stride=5)
        for label in example["labels"].tolist()
        if label != -100
    ]
    expected = chain.from_iterable([*byte_pairs(text)["input_ids"], byte_pairs.eos_token_id] for text in TEXTS)
    assert Counter(predicted) == Counter(expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_loader_read_their_shards_of_a_file(tmp_path, byte_pairs):
    documents = load_document_shards(write(tmp_path / "one", "a.jsonl", 1), shards=4)
    stream = build_blocks(documents, byte_pairs, block_size=13)
    whole = {tuple(each.example["input_ids"].tolist()) for each in Reader(stream, only_epoch=0)}
    seen = [set(), set()]
    for rank in range(2):
        loader = StreamLoader(stream, default_data_collator, batch_size=1, rank=rank, world=2, num_workers=2)
        seen[rank] |= {tuple(batch["input_ids"][0].tolist()) for batch in islice(loader, 2 * len(whole))}
        assert {shard for shard, (epoch, *_) in loader.progress.items() if epoch > 0} == {rank, rank + 2}
    assert seen[0] | seen[1] == whole


def test_shards_too_small_for_pairs_are_refused(word_pieces):
    documents = load_document_shards("embedded", shards=4, limit=7)
    with pytest.raises(ValueError, match="4 shards have 7: set stream_shards to 3 or less"):
        build_pretraining_dataset(documents, word_pieces, PretrainingOptions())


# Files that are missing


def test_a_file_that_cannot_be_opened_is_named_before_anything_is_read(tmp_path, byte_pairs):
    folder = write(tmp_path / "three", "a.jsonl", 3)
    stream = build_blocks(load_document_shards(folder), byte_pairs, block_size=13)
    (folder / "1-a.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"1-a\.jsonl"):
        StreamLoader(stream, default_data_collator, batch_size=2)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_vanishes_is_named_when_its_turn_comes(tmp_path, byte_pairs, name):
    folder = write(tmp_path / "three", name, 3)
    stream = build_blocks(load_document_shards(folder), byte_pairs, block_size=13)
    batches = iter(StreamLoader(stream, default_data_collator, batch_size=2))
    next(batches)
    (folder / f"2-{name}").unlink()
    with pytest.raises(RuntimeError, match=f"cannot read .*2-{name}"):
        list(islice(batches, 500))


def test_collators_pad_each_process_for_itself(word_pieces):
    stream = build_pretraining_dataset(load_document_shards("embedded", shards=4), word_pieces, PretrainingOptions())
    batch = next(iter(StreamLoader(stream, PretrainingCollator(word_pieces), batch_size=3)))
    assert batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max()
