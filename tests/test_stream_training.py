"""A Trainer on streams: it goes on where it stopped, alone and as two processes, or fails in all of them at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from launching import launch
from stream_cases import EVALUATED, TRAINED, Recorder, RecordExamples, pad
from training_cases import losses, tiny_examples, tiny_model

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments

# One process launches once for all of these tests.
pytestmark = pytest.mark.xdist_group("stream training")

ROOT = Path(__file__).parents[1]
SIZES = [7, 1, 4, 5, 3]
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:.*worker processes:UserWarning")


def trainer_of(folder, stream=None, collator=pad, **options) -> FLAMBeTrainer:
    args = FLAMBeTrainingArguments(output_dir=str(folder), **{**TRAINED, "max_steps": 6, **options})
    stream = RecordExamples(SIZES) if stream is None else stream
    return FLAMBeTrainer(tiny_model(dropout=0.1), args, train_dataset=stream, data_collator=collator)


def train(folder, resume: bool = False, **options) -> FLAMBeTrainer:
    trainer = trainer_of(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same_weights(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


# One process


@FORKS
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"dataloader_num_workers": 2}], ids=str)
def test_resuming_equals_never_having_stopped(tmp_path, options):
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "parts", max_steps=3, **options)
    resumed = train(tmp_path / "parts", resume=True, **options)
    assert losses(resumed) == losses(whole)
    assert [entry["epoch"] for entry in whole.state.log_history[:6]] == pytest.approx([n / 6 for n in range(1, 7)])
    assert [entry["epoch"] for entry in resumed.state.log_history[3:6]] == pytest.approx([4 / 6, 5 / 6, 1])
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("stream", [RecordExamples(SIZES), tiny_examples()], ids=["stream", "map"])
def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, stream):
    finished = train(tmp_path, max_steps=3, stream=stream)
    again = train(tmp_path, max_steps=3, stream=stream, resume=True)
    assert again.state.global_step == 3
    assert same_weights(finished, again)


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    train(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="the checkpoint belongs to another stream: num_shards=5 there and 4 here"):
        train(tmp_path, resume=True, stream=RecordExamples(SIZES[:4]))


def test_a_checkpoint_without_a_stream_is_refused_unless_it_may_begin_again(tmp_path):
    train(tmp_path, stream=tiny_examples(), max_steps=3)
    with pytest.raises(ValueError, match=r"does not say where its stream stood.*ignore_data_skip=true"):
        train(tmp_path, resume=True)
    recorder = Recorder()
    train(tmp_path, resume=True, ignore_data_skip=True, collator=recorder)
    from_the_beginning = Recorder()
    train(tmp_path / "fresh", max_steps=3, collator=from_the_beginning)
    assert recorder.records[:3] == from_the_beginning.records


def test_the_loss_of_batches_of_two_widths_is_that_of_one_batch(tmp_path):
    """Two micro batches, as of two processes: each label and each sequence counts once."""
    recorder = Recorder()
    options = {
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
    }
    args = FLAMBeTrainingArguments(output_dir=str(tmp_path), **{**TRAINED, **options})
    trainer = FLAMBeTrainer(tiny_model(), args, train_dataset=RecordExamples(SIZES), data_collator=recorder)
    trainer.train()
    one, two = recorder.batches
    assert pad(one)["input_ids"].shape != pad(two)["input_ids"].shape
    assert losses(trainer) == pytest.approx([tiny_model()(**pad(one + two)).loss.item()], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 30])
def test_an_evaluation_has_every_record_once(tmp_path, batch_size):
    recorder = Recorder()
    trainer = trainer_of(tmp_path, collator=recorder, per_device_eval_batch_size=batch_size)
    trainer.evaluate(RecordExamples(SIZES))
    assert sorted(record for batch in recorder.records for record in batch) == everything(SIZES)


def everything(sizes) -> list[tuple]:
    return [(shard, 0, index) for shard, size in enumerate(sizes) for index in range(size)]


def test_evaluating_a_stream_does_not_change_the_training(tmp_path):
    alone = train(tmp_path / "alone")
    args = FLAMBeTrainingArguments(output_dir=str(tmp_path / "both"), eval_strategy="steps", eval_steps=2, **TRAINED)
    args.max_steps = 6
    datasets = {"train_dataset": RecordExamples(SIZES), "eval_dataset": RecordExamples(SIZES)}
    both = FLAMBeTrainer(tiny_model(dropout=0.1), args, data_collator=pad, **datasets)
    both.train()
    assert same_weights(alone, both)


# Two processes


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two processes that ran, and what each of them saw."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "here.jsonl").write_text('{"text": "Here."}\n')
    _, output = launch(ROOT / "tests" / "workers" / "stream_runs.py", str(folder))
    found = [folder / f"facts-{rank}.json" for rank in range(2)]
    assert all(path.exists() for path in found), output
    return folder, [json.loads(path.read_text()) for path in found]


def flat(*runs) -> list[tuple]:
    return [tuple(record) for run in runs for batch in run["records"] for record in batch]


def test_two_processes_go_on_with_the_batches_of_an_undisturbed_run(two):
    for facts in two[1]:
        assert facts["stopped"]["records"] + facts["resumed"]["records"] == facts["whole"]["records"]
        assert facts["resumed"]["losses"] == facts["whole"]["losses"]
        assert facts["resumed"]["epochs"][3:] == facts["whole"]["epochs"][3:]
        assert facts["resumed"]["weights"] == facts["whole"]["weights"]


def test_two_processes_share_the_shards_out(two):
    seen = [flat(facts["whole"]) for facts in two[1]]
    assert len({*seen[0], *seen[1]}) == len(seen[0] + seen[1]) == 2 * 6 * 3
    assert [{shard for shard, _, _ in each} for each in seen] == [{0, 2, 4}, {1, 3}]


def test_one_process_goes_on_where_two_stopped(two, tmp_path):
    folder, facts = two
    shutil.copytree(folder / "parts" / "checkpoint-3", tmp_path / "checkpoint-3")
    recorder = Recorder()
    train(tmp_path, resume=True, collator=recorder, max_steps=12)
    before = flat(*(each["stopped"] for each in facts))
    after = [record for batch in recorder.records for record in batch]
    assert len({*before, *after}) == len(before + after)
    assert {*everything(SIZES)} <= {*before, *after}


@pytest.mark.parametrize("sizes", EVALUATED, ids=str)
def test_two_processes_evaluate_every_record_once(two, sizes):
    of_both = [facts["evaluated"][str(sizes)] for facts in two[1]]
    assert of_both[0]["ids"] == of_both[1]["ids"]
    assert sorted(map(tuple, of_both[0]["ids"])) == everything(sizes)


def test_a_file_that_one_process_lacks_ends_both(two):
    for moment in ("at the start", "of the loader"):
        messages = [facts[moment] for facts in two[1]]
        assert messages[0].startswith("RuntimeError: process 1: FileNotFoundError")
        assert messages[1].startswith("FileNotFoundError")
        assert all("gone.jsonl" in message for message in messages)
