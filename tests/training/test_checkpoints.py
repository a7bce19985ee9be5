"""Checkpoints of a process: stock, exact, listed when complete, checked when read, and never lost to another run."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from launching import FORKS, launches
from training_cases import losses, tiny_examples, tiny_model, tiny_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import IntervalStrategy

from hf_fnl import FactorizedBertForPreTraining, FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.training.checkpoints import CompleteCheckpoints, checkpoints, newest_complete
from hf_fnl.training.manifest import MANIFEST_FILE, fault, write_manifest
from hf_fnl.training.run_lock import LOCK_FILE, locked
from hf_fnl.training.runs import check_output_folder, checkpoint_to_resume

SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
FILES = [
    *("config.json", MANIFEST_FILE, "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"),
    *("trainer_state.json", "training_args.bin"),
]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_run(first: Trainer, second: Trainer) -> None:
    assert losses(first) == losses(second)
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(second)[name]), name


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def go_on(folder: Path, resume: str | bool = True, model: torch.nn.Module | None = None, **options) -> Trainer:
    """A run that goes on with a model of other weights."""
    trainer = tiny_trainer(folder, model or tiny_model(seed=5), **{**SAVES, **options})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Trainer:
    """A run with two checkpoints, whose folder is to be copied, not changed."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("run"), **SAVES, save_total_limit=5)
    trainer.train()
    return trainer


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run.args.output_dir, tmp_path / "copy"))


def test_a_checkpoint_is_the_stock_one_and_a_list_of_all_its_files(copy):
    for checkpoint in checkpoints(copy):
        assert sorted(path.name for path in checkpoint.iterdir()) == sorted(FILES)
        manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
        assert manifest["files"].keys() == {*FILES} - {MANIFEST_FILE}
        assert {n: r["bytes"] for n, r in manifest["files"].items()} == {
            name: (checkpoint / name).stat().st_size for name in manifest["files"]
        }
        assert (manifest["optimizer"], manifest["processes"]) == ("FLAMBe", 1)
        assert torch.load(checkpoint / "training_args.bin", weights_only=False).save_total_limit == 5
    assert names(copy) == ["checkpoint-2", "checkpoint-4"]
    assert [path.name for path in copy.glob("[._]*")] == [LOCK_FILE]


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(path.name).randrange(len(content) - 2)])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {"cut": cut, "flipped": flip, "missing": Path.unlink}
TOLD = {"cut": r"{} has [\d,]+ of [\d,]+ bytes", "flipped": "{} is not as it was written", "missing": "{} is missing"}
TOLD_OF_THE_LIST = {
    "cut": "its manifest.json, .* is damaged",
    "flipped": "is damaged",
    "missing": "it has no manifest.json",
}


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        *(("cut", "model.safetensors"), ("flipped", "optimizer.pt"), ("missing", "scheduler.pt")),
        *((harm, MANIFEST_FILE) for harm in HARMS),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason_and_refused_by_name(copy, caplog, harm, name):
    HARMS[harm](copy / "checkpoint-4" / name)
    told = TOLD_OF_THE_LIST[harm] if name == MANIFEST_FILE else TOLD[harm].format(name)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(copy) == copy / "checkpoint-2"
    (message,) = caplog.messages
    assert message.startswith(f"skipped {copy / 'checkpoint-4'}: ")
    if (harm, name) == ("missing", MANIFEST_FILE):
        return  # as another Trainer writes it: may be named
    with pytest.raises(ValueError, match=rf"cannot go on from .*checkpoint-4: .*{told}.*=true takes the newest"):
        go_on(copy, str(copy / "checkpoint-4"))


def test_going_on_from_the_one_before_equals_never_having_stopped(copy, run):
    (copy / "checkpoint-4" / MANIFEST_FILE).unlink()
    again = go_on(copy)
    assert_same_run(again, run)
    assert [fault(path) for path in checkpoints(copy)] == [None, None]


def test_where_all_are_damaged_nothing_starts_afresh_by_itself(copy):
    for checkpoint in checkpoints(copy):
        (checkpoint / "scheduler.pt").unlink()
    args = FLAMBeTrainingArguments(output_dir=str(copy), resume_from_checkpoint="true", use_cpu=True)
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is complete \(checkpoint-4: scheduler.pt is missing; ch"
    ):
        checkpoint_to_resume(args)


class Killed(BaseException):
    """Passes all handlers of errors, and leaves behind what a killed process would."""


class Kill(TrainerCallback):
    """Ends a training at the second checkpoint, before its list is written."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise Killed


@pytest.mark.parametrize("stage", ["weights", "files", "list", "removal"])
def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(tmp_path, monkeypatch, run, stage):
    trainer = tiny_trainer(tmp_path, **SAVES, save_total_limit=1)
    module, name = {
        "weights": (torch, "save"),
        "files": (CompleteCheckpoints, "on_save"),
        "list": (json, "dumps"),
        "removal": (shutil, "rmtree"),
    }[stage]
    honest = getattr(module, name)

    def killing(*args, **kwargs):
        late = trainer.state.global_step == 4 and trainer._checkpoints.unfinished is not None
        at_list = stage != "list" or "files" in args[0]
        if at_list and (late or (stage == "removal" and trainer.state.global_step == 4)):
            raise Killed
        return honest(*args, **kwargs)

    monkeypatch.setattr(module, name, killing)
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()
    assert newest_complete(tmp_path).name == ("checkpoint-4" if stage == "removal" else "checkpoint-2")
    assert_same_run(go_on(tmp_path), run)
    assert [path.name for path in tmp_path.glob("[._]*")] == [LOCK_FILE]


def test_a_run_killed_in_its_first_save_starts_afresh(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, **{**SAVES, "save_steps": 4})
    trainer.callback_handler.callbacks.insert(0, Kill())
    with pytest.raises(Killed):
        trainer.train()
    args = FLAMBeTrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint="true", use_cpu=True)
    assert checkpoint_to_resume(args) is None
    assert "skipped" in caplog.text
    assert "its saving was broken off" in caplog.text
    tiny_trainer(tmp_path, **SAVES).train()  # no other run's


def test_going_on_from_what_a_trainer_pushes_to_the_hub(tmp_path, run):
    """It uploads a checkpoint before its files are listed."""
    run_folder, pushed = tmp_path / "run", tmp_path / "last-checkpoint"
    trainer = tiny_trainer(run_folder, **{**SAVES, "max_steps": 2})
    push = TrainerCallback()
    push.on_save = lambda *args, **kwargs: shutil.copytree(run_folder / "checkpoint-2", pushed) and None
    trainer.callback_handler.callbacks.insert(0, push)
    trainer.train()
    assert_same_run(go_on(tmp_path / "again", str(pushed)), run)


@pytest.mark.parametrize(
    "options",
    [{"optim": "flambe", "frobenius_decay": ["ov", "linear"]}, {"optim": "adamw_torch", "frobenius_decay": ["linear"]}],
    ids=["flambe", "adamw"],
)
def test_a_resumed_run_is_the_same_bit_by_bit(tmp_path, options):
    options = {**SAVES, **options, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    straight = tiny_trainer(tmp_path / "straight", tiny_model(dropout=0.2), **options)
    straight.train()
    again = tiny_trainer(tmp_path / "again", tiny_model(dropout=0.2, seed=5), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert_same_run(again, straight)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_epoch_end"])
def test_a_checkpoint_of_a_run_that_is_told_to_end_is_complete(tmp_path, event):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=9, max_steps=4, enable_jit_checkpoint=True)
    saving = next(c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback))
    request = TrainerCallback()  # in the place of SIGTERM, after which the request comes by a clock
    setattr(request, event, lambda *args, **kwargs: setattr(saving.jit_manager, "is_checkpoint_requested", True))
    trainer.callback_handler.callbacks.insert(0, request)
    trainer.train()
    (found,) = checkpoints(tmp_path)
    assert fault(found) is None
    assert sorted(path.name for path in found.iterdir()) == sorted(FILES)


def test_a_run_that_has_all_its_steps_is_not_trained_on(copy, run):
    again = go_on(copy)
    assert again.state.global_step == 4
    assert_same_run(again, run)


def stock_trainer(folder: Path, *callbacks: TrainerCallback, seed: int = 0) -> Trainer:
    args = TrainingArguments(
        str(folder), learning_rate=0.02, per_device_train_batch_size=8, lr_scheduler_type="constant", logging_steps=1,
        report_to="none", disable_tqdm=True, use_cpu=True, optim="adamw_torch", **SAVES,
    )  # fmt: skip
    return Trainer(tiny_model(seed=seed), args, train_dataset=tiny_examples(), callbacks=list(callbacks))


def test_a_stock_trainer_goes_on_from_ours_and_we_from_its(tmp_path, caplog):
    adamw = {"optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "adam_epsilon": 1e-8}
    ours = tiny_trainer(tmp_path / "ours", **SAVES, **adamw)
    ours.train()
    stock = stock_trainer(tmp_path / "stock", seed=5)
    stock.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert_same_run(stock, ours)
    theirs = str(tmp_path / "stock" / "checkpoint-4")
    assert go_on(tmp_path / "again", theirs, **adamw).state.global_step == 4
    assert "has no list of its files, and is taken as it is, unchecked" in caplog.text
    with pytest.raises(ValueError, match=r"no checkpoint in .*: it has no manifest.json.*another Trainer wrote it"):
        go_on(tmp_path / "stock")


def test_any_trainer_may_list_its_files(tmp_path):
    trainer = stock_trainer(tmp_path, CompleteCheckpoints())
    trainer.train()
    assert [fault(path) for path in checkpoints(tmp_path)] == [None, None]


def test_options_that_come_from_the_checkpoint_are_said(copy, tmp_path, caplog):
    options = {"weight_decay": 0.3, "learning_rate": 0.5, "max_steps": 3}
    go_on(tmp_path / "again", str(copy / "checkpoint-2"), **options)
    (message,) = [each for each in caplog.messages if "not from this run" in each]
    assert message.endswith("learning_rate=0.02 (here 0.5), weight_decay=0.1 (here 0.3)")


def test_options_that_an_engine_writes_otherwise_are_the_same(copy, tmp_path, caplog):
    checkpoint = copy / "checkpoint-2"
    (checkpoint / MANIFEST_FILE).unlink()
    state = torch.load(checkpoint / "optimizer.pt")
    for group in state["param_groups"]:
        group["betas"] = list(group["betas"])
    torch.save(state, checkpoint / "optimizer.pt")
    go_on(tmp_path / "again", str(checkpoint), max_steps=3)
    assert "unchecked" in caplog.text
    assert "not from this run" not in caplog.text


def test_a_checkpoint_of_another_optimizer_or_model_is_refused_by_name(copy, tmp_path):
    checkpoint = str(copy / "checkpoint-2")
    with pytest.raises(
        ValueError, match=r"the optimizer of .*checkpoint-2 is FLAMBe and that of this run AdamW: set op"
    ):
        go_on(tmp_path / "adamw", checkpoint, optim="adamw_torch")
    config = tiny_model().config
    config.ffn_rank = 6
    with pytest.raises(ValueError, match=r"not of the Factorized.* of this run: .*\(40, 7\) there and \(40, 6\) here"):
        go_on(tmp_path / "rank", checkpoint, FactorizedBertForPreTraining(config))
    with pytest.raises(ValueError, match=r"not of the BertForPreTraining of this run: .* \(30 in all\)"):
        go_on(tmp_path / "stock", checkpoint, tiny_model(stock=True))


def test_a_checkpoint_of_the_model_only_is_refused(copy, tmp_path):
    (copy / "checkpoint-4" / "optimizer.pt").unlink()
    write_manifest(copy / "checkpoint-4")
    with pytest.raises(ValueError, match=r"does not go on from .*checkpoint-4, which holds no state of an optimizer"):
        go_on(tmp_path / "again", str(copy / "checkpoint-4"))


def test_no_space_left_while_saving_leaves_the_earlier_checkpoint_complete(tmp_path, monkeypatch):
    options = {**SAVES, "save_total_limit": 1}
    trainer = tiny_trainer(tmp_path, **options)
    save = torch.save

    def full(*args, **kwargs):
        if trainer.state.global_step > 2:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match=r"could not write .*checkpoint-4: .*No space left on device; earlier"):
        trainer.train()
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-2"]
    assert go_on(tmp_path, **options).state.global_step == 4


class Best(TrainerCallback):
    """Makes the second step the best one."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_worse"] = state.global_step


@pytest.mark.parametrize("limit", [1, 2])
def test_the_best_checkpoint_stays_and_comes_back(tmp_path, limit):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": False}
    options |= {"metric_for_best_model": "worse", "save_total_limit": limit, "max_steps": 8}
    args = tiny_trainer(tmp_path, **SAVES).args
    for name, value in {**options, "eval_strategy": IntervalStrategy.STEPS}.items():
        setattr(args, name, value)
    trainer = FLAMBeTrainer(tiny_model(), args, train_dataset=tiny_examples(), eval_dataset=tiny_examples(8))
    trainer.add_callback(Best())
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", *(["checkpoint-8"] if limit > 1 else [])]
    there = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2")
    for name, weight in weights(trainer).items():
        assert torch.equal(weight, there.get_parameter(name)), name
    assert trainer.args.save_total_limit == limit


def test_older_checkpoints_go_by_step_whatever_the_clock_says(tmp_path):
    class Backwards(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for number, path in enumerate(reversed(checkpoints(tmp_path))):
                os.utime(path, (2e9 + 1000 * number,) * 2)

    trainer = tiny_trainer(tmp_path, **{**SAVES, "max_steps": 8, "save_total_limit": 2})
    trainer.add_callback(Backwards())
    trainer.train()
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_what_an_earlier_attempt_left_ahead_goes_first(copy):
    go_on(copy, str(copy / "checkpoint-2"), save_steps=1, max_steps=3, save_total_limit=2)
    assert names(copy) == ["checkpoint-2", "checkpoint-3"]


def test_a_fresh_run_into_the_folder_of_another_is_refused(copy, run):
    with pytest.raises(
        ValueError, match=r"holds checkpoint-4 of an earlier run: set resume_from_checkpoint=true .* or an"
    ):
        tiny_trainer(copy, **SAVES).train()
    assert [fault(path) for path in checkpoints(copy)] == [None, None]
    tiny_trainer(copy, **{**SAVES, "save_strategy": "no"}).train()  # which writes no checkpoints


def hold(folder, is_held):
    with locked(folder):
        is_held.set()
        signal.pause()


@launches
def test_two_runs_in_one_folder(tmp_path):
    is_held = FORKS.Event()
    other = FORKS.Process(target=hold, args=(tmp_path, is_held))
    other.start()
    assert is_held.wait(60)
    message = f"is in use by process {other.pid} on {socket.gethostname()}: choose another output_dir"
    with pytest.raises(RuntimeError, match=message):
        tiny_trainer(tmp_path).train()
    with pytest.raises(RuntimeError, match=message):
        check_output_folder(FLAMBeTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    other.kill()
    other.join()
    with locked(tmp_path):  # the system released the lock of the dead
        tiny_trainer(tmp_path, max_steps=1).train()  # in a process that holds it already


def test_machines_with_folders_of_their_own_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(ValueError, match="one output_dir that all machines share"):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_on_each_node=True)
