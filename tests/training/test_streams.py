"""Streams: whoever reads them, no example is used twice or never in a pass, and a run goes on where it stopped."""

from __future__ import annotations

import gzip
import json
from itertools import chain, islice
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from launching import launch, launches
from stream_cases import COUNT, TRAINED, Recorder, stream
from training_cases import losses, tiny_model

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.tasks import documents
from hf_fnl.tasks.documents import load_documents
from hf_fnl.training import streaming
from hf_fnl.training.manifest import write_manifest
from hf_fnl.training.streaming import stream_loader

FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*worker processes:UserWarning")
TEXTS = [f"Number {number} begins here. It goes on to its end." for number in range(23)]


def lines(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


WRITERS = {
    "a.txt": lambda path, texts: path.write_text("\n\n".join(texts)),
    "a.jsonl": lambda path, texts: path.write_text(lines(texts)),
    "a.json.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts).encode())),
    "a.parquet": lambda path, texts: pyarrow.parquet.write_table(pa.table({"text": texts}), path, row_group_size=5),
}


# Documents


@pytest.mark.parametrize("name", WRITERS)
def test_every_document_is_in_one_shard(tmp_path, name):
    for number in range(3):
        WRITERS[name](tmp_path / f"{number}-{name}", TEXTS[number::3])
    found = load_documents(tmp_path, streaming=True)
    assert found.num_shards == (6 if name == "a.parquet" else 3)
    parts = [found.shard(found.num_shards, number) for number in range(found.num_shards)]
    texts = [row["text"] for part in parts for row in part]
    assert sorted(texts) == sorted(TEXTS)
    first = load_documents(tmp_path, streaming=True, limit=11)
    assert [row["text"] for row in first] == [row["text"] for row in load_documents(tmp_path, limit=11)]


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"a": 3, "b": 5}, "data file b: 4 bytes in process 0, 5 bytes in process 1"),
        ({"a": 3}, "data file b: 4 bytes in process 0, not there in process 1"),
        ({"a": 3, "b": 4, "c": 1}, "data file c: not there in process 0, 1 bytes in process 1"),
    ],
    ids=["other size", "fewer", "more"],
)
def test_processes_that_see_other_files_are_refused(monkeypatch, there, message):
    monkeypatch.setattr(documents, "gather", lambda here: [{"a": 3, "b": 4}, there])
    with pytest.raises(ValueError, match=message):
        documents.check_same_files([])


# Loaders


def loader_of(rank: int, world: int, workers: int = 0, batch_size: int = 1, dataset=None):
    """The loader of a process, whose batches are lists of numbers."""
    args = SimpleNamespace(
        process_index=rank, world_size=world, train_batch_size=batch_size, dataloader_num_workers=workers,
        dataloader_prefetch_factor=None, dataloader_multiprocessing_context=None, dataloader_pin_memory=False,
    )  # fmt: skip
    return stream_loader(dataset or stream(), numbers, args)


def numbers(examples: list[dict]) -> list[int]:
    return [int(example["input_ids"][0]) - 5 for example in examples]


def one_pass(loader) -> list[int]:
    seen: list[int] = []
    for (number,) in loader:
        if number in seen:
            return seen
        seen.append(number)
    return seen


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_with_shards_of_their_own_share_every_example(world):
    passes = [one_pass(loader_of(rank, world)) for rank in range(world)]
    assert sorted(chain.from_iterable(passes)) == [*range(COUNT)]


def test_more_processes_than_shards_take_turns():
    in_turn = zip(*(loader_of(rank, 7) for rank in range(7)), strict=True)
    drawn = list(chain.from_iterable(chain.from_iterable(islice(in_turn, 7))))
    assert sorted(drawn[:COUNT]) == sorted(drawn[COUNT : 2 * COUNT]) == [*range(COUNT)]


@FORKS
def test_workers_share_the_shards_of_a_process():
    loaders = [loader_of(rank, 2, workers=4) for rank in range(2)]
    assert [loader.num_workers for loader in loaders] == [3, 2]
    drawn = [set(chain.from_iterable(islice(loader, 30))) for loader in loaders]
    assert not drawn[0] & drawn[1]
    assert drawn[0] | drawn[1] == {*range(COUNT)}


def test_a_process_without_an_example_is_refused():
    with pytest.raises(ValueError, match="no example in the stream for process 2: give more data"):
        loader_of(2, 3, dataset=stream(2, shards=1))


def test_a_stream_whose_batch_size_is_to_be_found_is_refused(tmp_path):
    args = FLAMBeTrainingArguments(str(tmp_path), auto_find_batch_size=True, use_cpu=True)
    with pytest.raises(ValueError, match="auto_find_batch_size changes no batches of a stream"):
        FLAMBeTrainer(tiny_model(), args, train_dataset=stream())


# A Trainer


def train(folder, resume: bool = False, **options) -> tuple[FLAMBeTrainer, Recorder]:
    args = FLAMBeTrainingArguments(output_dir=str(folder), **{**TRAINED, "max_steps": 6, **options})
    recorder = Recorder()
    trainer = FLAMBeTrainer(tiny_model(dropout=0.1), args, train_dataset=stream(), data_collator=recorder)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def same_weights(one: FLAMBeTrainer, two: FLAMBeTrainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.fixture(params=[True, False], ids=["torchdata", "skipping"])
def knows_its_place(request, monkeypatch) -> bool:
    if request.param:
        pytest.importorskip("torchdata")
    else:
        monkeypatch.setattr(streaming, "is_torchdata_stateful_dataloader_available", lambda: False)
    return request.param


@FORKS
@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2, "gradient_accumulation_steps": 2}], ids=str)
def test_resuming_equals_never_having_stopped(tmp_path, knows_its_place, options):
    whole, read = train(tmp_path / "whole", **options)
    train(tmp_path / "parts", max_steps=3, **options)
    assert (tmp_path / "parts" / "checkpoint-3" / "stream-0.json").exists() == knows_its_place
    resumed, read_again = train(tmp_path / "parts", resume=True, **options)
    assert losses(resumed) == losses(whole)
    assert [entry["epoch"] for entry in resumed.state.log_history[3:6]] == pytest.approx([4 / 6, 5 / 6, 1])
    assert same_weights(whole, resumed)
    assert not resumed.args.ignore_data_skip
    if not options:
        per_run = 3 if knows_its_place else 6
        assert read_again.batches[:per_run] == read.batches[6 - per_run : 6]


def test_without_a_skip_the_stream_begins_at_its_beginning(tmp_path, knows_its_place):
    _, read = train(tmp_path, max_steps=3)
    _, read_again = train(tmp_path, resume=True, ignore_data_skip=True)
    assert read_again.batches[:3] == read.batches[:3]


def test_other_readers_read_up_to_the_step(tmp_path, caplog):
    pytest.importorskip("torchdata")
    train(tmp_path, max_steps=3)
    path = tmp_path / "checkpoint-3" / "stream-0.json"
    path.write_text(path.read_text().replace("1 processes", "2 processes"))
    write_manifest(tmp_path / "checkpoint-3")
    _, read_again = train(tmp_path, resume=True)
    assert "was written by 2 processes with 0 workers and this run has 1 processes" in caplog.text
    assert len(read_again.batches) >= 6


@launches
def test_two_processes_share_a_stream_and_go_on(tmp_path):
    (tmp_path / "here.jsonl").write_text(lines(TEXTS))
    codes, output = launch("tests/support/workers/stream_runs.py", str(tmp_path))
    assert codes == [0, 0], output
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(2)]
    for shards in (5, 1):
        whole, resumed = ([each[f"{name} {shards}"] for each in facts] for name in ("whole", "resumed"))
        seen = [set(chain.from_iterable(each["batches"][:3])) for each in whole]
        assert not seen[0] & seen[1]
        for run, again in zip(whole, resumed, strict=True):
            assert again["losses"] == run["losses"]
            assert again["weights"] == run["weights"] == whole[0]["weights"]
            assert again["batches"][-3:] == run["batches"][-3:]
    assert facts[1]["missing"].startswith("FileNotFoundError")
    assert "gone.jsonl" in facts[0]["missing"]
    assert facts[0]["missing"].startswith("RuntimeError: process 1")
