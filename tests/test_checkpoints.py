"""Checkpoints of a process: whole or not there, exact, checked when read, written while training goes on."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoint_cases import contents
from training_cases import losses, tiny_examples, tiny_model, tiny_trainer
from transformers import Trainer
from typer.testing import CliRunner

from hf_fnl import FactorizedBertForPreTraining, FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.cli.app import app
from hf_fnl.training.checkpoints import collecting, folders, saving
from hf_fnl.training.checkpoints import trainer as checkpointing
from hf_fnl.training.checkpoints.contents import Held
from hf_fnl.training.checkpoints.manifest import MANIFEST_FILE, fault
from hf_fnl.training.checkpoints.pieces import Pieces, Range, write_pieces
from hf_fnl.training.checkpoints.random_numbers import restore_random_numbers
from hf_fnl.training.checkpoints.resume import newest_whole, tied_are_not_missing
from hf_fnl.training.runs import checkpoint_to_resume

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with two checkpoints; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("run")
    tiny_trainer(folder, **SAVES).train()
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_the_manifest_lists_every_file_and_nothing_is_left_over(run):
    for step in (2, 4):
        folder = run / f"checkpoint-{step}"
        listed = json.loads((folder / MANIFEST_FILE).read_text())["files"]
        assert {path.name for path in folder.iterdir()} == {*listed, MANIFEST_FILE}
        assert {name: record["bytes"] for name, record in listed.items()} == {
            name: (folder / name).stat().st_size for name in listed
        }
    assert [path.name for path in run.glob(".*")] == []


FILES = [
    *("config.json", MANIFEST_FILE, "model.safetensors", "optimizer.json", "rng_state.pth", "scheduler.pt"),
    *("shard-00000-of-00001.safetensors", "trainer_state.json", "training_args.bin"),
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_makes_the_one_before_the_newest(copy, caplog, name):
    path = copy / "checkpoint-4" / name
    whole = path.read_bytes()
    cut = random.Random(name).randrange(len(whole) - 2)
    path.write_bytes(whole[:cut])
    with caplog.at_level(logging.WARNING):
        assert newest_whole(copy) == copy / "checkpoint-2"
    told = f"{name} is damaged" if name == MANIFEST_FILE else f"{name} has {cut:,} of {len(whole):,} bytes"
    assert f"skipped checkpoint-4: {told}" in caplog.text
    with pytest.raises(ValueError, match=rf"checkpoint-4 is not whole: {name}"):
        tiny_trainer(copy, **SAVES).train(resume_from_checkpoint=str(copy / "checkpoint-4"))


def test_one_changed_byte_and_a_missing_file_are_seen(copy):
    path = copy / "checkpoint-4" / "shard-00000-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    assert fault(copy / "checkpoint-4") == f"{path.name} is not as it was written: its checksum differs"
    path.unlink()
    assert fault(copy / "checkpoint-4") == f"{path.name} is missing"


def test_without_a_whole_checkpoint_nothing_starts_afresh_by_itself(copy):
    for step in (2, 4):
        (copy / f"checkpoint-{step}" / "scheduler.pt").unlink()
    args = FLAMBeTrainingArguments(output_dir=str(copy), resume_from_checkpoint="true", use_cpu=True)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(checkpoint-4: scheduler.pt is missing; ch"):
        checkpoint_to_resume(args)
    args.resume_from_checkpoint = str(copy / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 is not whole: scheduler.pt is missing"):
        checkpoint_to_resume(args)


@pytest.mark.parametrize("stage", ["small files", "weights", "optimizer", "receipt", "manifest", "name"])
def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch, run, stage):
    class Killed(BaseException):
        """Passes all handlers of errors, and leaves behind what a killed process would."""

    module, name = {
        "small files": (checkpointing.CheckpointingTrainer, "_note_callbacks"),
        "weights": (Trainer, "_save"),
        "optimizer": (collecting, "write_pieces"),
        "receipt": (saving, "give_receipt"),
        "manifest": (saving, "seal"),
        "name": (saving, "publish"),
    }[stage]
    calls, honest = [], getattr(module, name)

    def killing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return honest(*args, **kwargs)

    trainer = tiny_trainer(tmp_path, **SAVES, save_total_limit=1)
    monkeypatch.setattr(module, name, killing)
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()
    assert fault(tmp_path / "checkpoint-2") is None
    assert (tmp_path / ".checkpoint-4.unfinished").is_dir()
    # What only lacked its name is whole, and gets it.
    assert newest_whole(tmp_path) == tmp_path / ("checkpoint-4" if stage == "name" else "checkpoint-2")
    assert list(tmp_path.glob(".*")) == []
    again = tiny_trainer(tmp_path, tiny_model(seed=5), **SAVES)
    again.train(resume_from_checkpoint=True)
    assert_same(contents(tmp_path / "checkpoint-4"), contents(run / "checkpoint-4"))


@pytest.mark.parametrize("form", ["full", "sharded"])
@pytest.mark.parametrize(
    "options",
    [
        {"optim": "flambe", "frobenius_decay": ["ov", "linear"]},
        {"optim": "adamw_torch"},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "sgd"},
    ],
    ids=["flambe", "adamw", "sgd-momentum", "sgd"],
)
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, form, options):
    options = {**SAVES, **options, "checkpoint_format": form, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    straight = tiny_trainer(tmp_path / "straight", tiny_model(dropout=0.2), **options)
    straight.train()
    again = tiny_trainer(tmp_path / "again", tiny_model(dropout=0.2, seed=5), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same(weights(again), weights(straight))
    assert losses(again) == losses(straight)
    assert_same(contents(tmp_path / "again" / "checkpoint-4"), contents(tmp_path / "straight" / "checkpoint-4"))


def test_an_optimizer_with_other_state_is_saved_as_transformers_does_where_that_works(tmp_path):
    options = {**SAVES, "optim": "adafactor", "frobenius_decay": ["none"]}
    straight = tiny_trainer(tmp_path / "straight", **options)
    straight.train()
    assert fault(tmp_path / "straight" / "checkpoint-2") is None
    again = tiny_trainer(tmp_path / "again", tiny_model(seed=5), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same(weights(again), weights(straight))
    with pytest.raises(RuntimeError, match=r"could not write .*: Adafactor keeps exp_avg_sq_row .* another optim"):
        tiny_trainer(tmp_path / "sharded", **options, checkpoint_format="sharded").train()


def test_another_optimizer_than_the_checkpoints_is_refused(run, tmp_path):
    trainer = tiny_trainer(tmp_path, **SAVES, optim="adamw_torch")
    with pytest.raises(ValueError, match=r"the optimizer of .*checkpoint-2 is FLAMBe and that of this run AdamW"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


def test_a_checkpoint_of_the_plain_trainer_is_taken_up_if_it_can_be_opened(tmp_path, monkeypatch):
    straight = tiny_trainer(tmp_path / "straight", **SAVES)
    for name in ("_save_checkpoint", "_prepare_for_training"):
        monkeypatch.setattr(checkpointing.CheckpointingTrainer, name, getattr(Trainer, name))
    straight.train()
    monkeypatch.undo()
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    assert not (checkpoint / MANIFEST_FILE).exists()
    again = tiny_trainer(tmp_path / "again", tiny_model(seed=5), **SAVES)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(again), weights(straight))
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        path = checkpoint / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert f"{name} cannot be read" in str(fault(checkpoint))
        path.write_bytes(whole)
    assert fault(checkpoint) is None


def test_a_checkpoint_of_the_model_only_starts_the_optimizer_anew(tmp_path, caplog):
    tiny_trainer(tmp_path / "first", **SAVES, save_only_model=True, checkpoint_format="sharded").train()
    again = tiny_trainer(tmp_path / "again", tiny_model(seed=5), **SAVES)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    assert "holds the model only: the optimizer and its schedule start anew" in caplog.text


def test_the_best_model_is_loaded_from_its_parts(tmp_path):
    args = FLAMBeTrainingArguments(
        output_dir=str(tmp_path), checkpoint_format="sharded", async_save=True, save_total_limit=1, save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="worse",
        greater_is_better=False, max_steps=6, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = FLAMBeTrainer(tiny_model(), args, train_dataset=tiny_examples(), eval_dataset=tiny_examples(8))
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: {**evaluate(*args, **kwargs), "eval_worse": trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = contents(tmp_path / "checkpoint-2")
    for name, weight in weights(trainer).items():
        assert torch.equal(weight.reshape(-1), best[f"weight/{name}"]), name


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_saving_in_the_background_writes_the_same_while_training_goes_on(tmp_path, run, monkeypatch, form):
    write, seen = collecting.Part.write, []

    def slow(part, path):
        seen.append((threading.current_thread() is threading.main_thread(), trainer.state.global_step))
        time.sleep(0.5)
        seen.append(trainer.state.global_step)
        write(part, path)

    monkeypatch.setattr(collecting.Part, "write", slow)
    trainer = tiny_trainer(tmp_path, **SAVES, async_save=True, checkpoint_format=form)
    trainer.train()
    assert seen[0] == (False, 2)
    assert seen[1] > 2
    for step in (2, 4):
        assert fault(tmp_path / f"checkpoint-{step}") is None
        assert_same(contents(tmp_path / f"checkpoint-{step}"), contents(run / f"checkpoint-{step}"))


def test_an_error_in_the_background_is_raised_at_the_next_step(tmp_path, monkeypatch):
    def full(part, path):
        raise OSError(28, "No space left on device")

    trainer = tiny_trainer(tmp_path, **{**SAVES, "max_steps": 40, "save_steps": 2}, async_save=True)
    honest, steps = collecting.Part.write, []
    monkeypatch.setattr(collecting.Part, "write", lambda *a: (full if trainer.state.global_step > 2 else honest)(*a))
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (time.sleep(0.1), steps.append(1), step(*args, **kwargs))[-1]
    with pytest.raises(RuntimeError, match=r"could not write .*checkpoint-4: .*No space left on device; earlier"):
        trainer.train()
    assert 4 < len(steps) < 8
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert fault(tmp_path / "checkpoint-2") is None


def test_rotation_spares_what_was_just_written_and_removes_at_once(copy, monkeypatch):
    monkeypatch.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)
    folders.rotate(copy, 1, keep={copy / "checkpoint-2"})
    assert sorted(path.name for path in copy.glob("*checkpoint*")) == [".checkpoint-4.removed", "checkpoint-2"]
    monkeypatch.undo()
    folders.clean(copy)
    assert [path.name for path in copy.glob("*checkpoint*")] == ["checkpoint-2"]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_parts_of_copies_make_up_the_whole(tmp_path, count):
    sizes = {"a": (5, 7), "b": (3,), "c": (1,), "d": (4, 2, 3)}
    tensors = {name: torch.randn(shape) for name, shape in sizes.items()}
    held = [
        Held(name, sizes[name], 0, t.numel(), None, {"weight": t, **({"exp_avg": -t} if name != "b" else {})})
        for name, t in tensors.items()
    ]
    written = []
    for index in range(count):
        pieces = dict(collecting._cut(held, index, count))
        written.append(sum(piece.numel() for _, piece in pieces.values()))
        write_pieces(tmp_path / f"shard-{index}-of-{count}.safetensors", pieces, {})
    assert sum(written) == sum(t.numel() * (2 if name != "b" else 1) for name, t in tensors.items())
    assert max(written) - min(written) <= 3
    with Pieces(sorted(tmp_path.iterdir())) as stored:
        for name, tensor in tensors.items():
            assert torch.equal(stored.read(f"weight/{name}"), tensor.reshape(-1))
            for start, stop in ((0, 1), (1, tensor.numel()), (tensor.numel() // 2, tensor.numel()), (1, 1)):
                assert torch.equal(stored.read(f"weight/{name}", start, stop), tensor.reshape(-1)[start:stop])


def test_a_range_that_is_in_no_file_is_an_error(tmp_path):
    for start, stop in ((0, 4), (6, 10)):
        span, piece = Range((2, 5), start, stop), torch.arange(start, stop)
        write_pieces(tmp_path / f"{start}.safetensors", {"weight/w": (span, piece)}, {})
    with Pieces(sorted(tmp_path.iterdir())) as stored:
        assert stored.read("weight/w", 7, 9).tolist() == [7, 8]
        with pytest.raises(ValueError, match="elements 4 to 8 of weight/w are in none of the files"):
            stored.read("weight/w", 3, 8)
        with pytest.raises(KeyError, match="weight/v is in none of"):
            stored.read("weight/v")


def test_random_numbers_of_another_number_of_processes(run, tmp_path, caplog):
    checkpoint = Path(shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2"))
    args = FLAMBeTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert not restore_random_numbers(checkpoint, args)  # as many as before: Transformers does it
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert restore_random_numbers(checkpoint, args)
    expected = torch.load(checkpoint / "rng_state_0.pth", weights_only=False)
    assert torch.equal(torch.get_rng_state(), expected["cpu"])
    assert random.getstate() == expected["python"]
    (checkpoint / "rng_state_0.pth").unlink()
    (checkpoint / "rng_state_2.pth").write_bytes(b"")
    assert restore_random_numbers(checkpoint, args)
    assert "has the random numbers of 2 processes: process 0 of 1 starts its own from seed 44" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_format": "whole"}, "checkpoint_format must be one of full, sharded, got 'whole'"),
        ({"checkpoint_format": "sharded", "dense_steps": 3}, "dense_steps needs whole weights in checkpoints"),
        (
            {"checkpoint_format": "sharded", "push_to_hub": True, "hub_strategy": "checkpoint"},
            "checkpoint_format=sharded does not work with hub_strategy=checkpoint",
        ),
        ({"async_save": True, "push_to_hub": True}, "async_save=True does not work with hub_strategy=every_save"),
    ],
    ids=["format", "dense steps", "sharded to the Hub", "in the background to the Hub"],
)
def test_bad_options_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_machines_with_folders_of_their_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(ValueError, match="one output_dir that all machines share"):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_on_each_node=True)


def test_the_command_consolidates_and_refuses_what_is_damaged(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", **SAVES, checkpoint_format="sharded")
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    order = ["consolidate", str(checkpoint), "--out", str(tmp_path / "model"), "--json"]
    done = CliRunner().invoke(app, order)
    assert done.exit_code == 0, done.output
    saved = weights(trainer)
    assert json.loads(done.stdout)["bytes"] == 4 * sum(math.prod(weight.shape) for weight in saved.values())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = FactorizedBertForPreTraining.from_pretrained(tmp_path / "model")
    assert_same(dict(loaded.named_parameters()), saved)
    (checkpoint / "shard-00000-of-00001.safetensors").write_bytes(b"")
    refused = CliRunner().invoke(app, [*order, "--overwrite"])
    assert refused.exit_code == 1
    assert "is not whole: shard-00000-of-00001.safetensors has 0 of" in refused.stderr
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["head.weight"], False),
        (["embedding.weight"], False),
        (["embedding.weight", "head.weight"], True),
        (["head.weight", "body.bias"], True),
        (["elsewhere"], True),
    ],
)
def test_the_trainer_warns_of_missing_keys_unless_they_are_tied_to_others(monkeypatch, missing, told):
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(3, 2), "body": torch.nn.Linear(2, 2)})
    model["head"] = torch.nn.Linear(2, 3, bias=False)
    model["head"].weight = model["embedding"].weight
    log, said = logging.getLogger("transformers.trainer"), []
    monkeypatch.setattr(log, "handle", lambda record: log.filter(record) and said.append(record.getMessage()))
    message = f"There were missing keys in the checkpoint model loaded: {missing}."
    with tied_are_not_missing(model):
        log.warning(message)
        log.warning("another matter")
    log.warning(message)
    assert said == [*[message] * told, "another matter", message]
