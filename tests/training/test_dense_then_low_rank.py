"""A dense phase and a low-rank one in one run: what the switch changes, and that breaking off changes nothing."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from launching import launch, launches
from low_rank_cases import (
    DEFAULTS,
    SWITCH,
    factorize_bert,
    factorize_gpt2,
    low_rank_trainer,
    tiny_bert,
    tiny_gpt2,
    tiny_texts,
)
from torch import nn
from training_cases import losses
from transformers import GPT2LMHeadModel, Trainer, TrainerState, TrainingArguments

from hf_fnl import (
    FactorizationConfig,
    FactorizedLinear,
    FLAMBe,
    FLAMBeTrainer,
    FLAMBeTrainingArguments,
    Lamb,
    factorize_,
    load,
)
from hf_fnl.training import DenseThenLowRank, low_rank_phase, match_checkpoint_
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE

WORKER = Path(__file__).parents[1] / "support" / "workers" / "low_rank.py"
SAVING = {"save_strategy": "steps", "save_steps": 1, "low_rank_lr_scale": 0.5}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_run(first: Trainer, second: Trainer) -> None:
    assert losses(first) == losses(second)
    theirs = weights(second.model)
    assert list(weights(first.model)) == list(theirs)
    for name, weight in weights(first.model).items():
        assert torch.equal(weight, theirs[name]), name


def factorized(model: nn.Module) -> int:
    return sum(isinstance(module, FactorizedLinear) for module in model.modules())


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Trainer:
    """A run that nothing interrupts, with a checkpoint of each step."""
    trainer = low_rank_trainer(tmp_path_factory.mktemp("straight"), **SAVING)
    trainer.train()
    return trainer


def partly_frozen() -> GPT2LMHeadModel:
    model = tiny_gpt2()
    model.transformer.h[0].mlp.requires_grad_(False)
    return model


def checkpoint(trainer: Trainer, step: int) -> str:
    return str(Path(trainer.args.output_dir) / f"checkpoint-{step}")


def test_lamb_trains_the_dense_model_and_flambe_its_factors(tmp_path):
    trainer = low_rank_trainer(tmp_path)
    trainer.create_optimizer()
    assert type(trainer.optimizer) is Lamb
    trainer.train()
    assert type(trainer.optimizer.optimizer) is FLAMBe
    assert {p.kind for p in trainer.optimizer.optimizer.products} == {"linear"}
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {6}
    groups = [(len(group["params"]), group["weight_decay"]) for group in trainer.optimizer.param_groups]
    assert groups == [(4, 0.1), (18, 0.0), (12, 0.1)]


def test_checkpoints_up_to_the_last_dense_step_are_dense(straight):
    forms = {step: factorized(GPT2LMHeadModel.from_pretrained(checkpoint(straight, step))) for step in (2, 3, 4, 6)}
    assert forms == {2: 0, 3: 0, 4: 6, 6: 6}
    final = load(checkpoint(straight, 6))
    for name, weight in weights(straight.model).items():
        assert torch.equal(weight, final.get_parameter(name)), name


@pytest.mark.parametrize(
    ("step", "low_rank_model"), [(SWITCH - 1, True), (SWITCH, False), (SWITCH, True), (SWITCH + 1, False)]
)
def test_going_on_equals_never_having_stopped(straight, tmp_path, step, low_rank_model):
    model = tiny_gpt2(seed=5)
    if low_rank_model:
        factorize_(model, FactorizationConfig(rank=2))
    trainer = low_rank_trainer(tmp_path, model, **SAVING)
    trainer.train(resume_from_checkpoint=checkpoint(straight, step))
    assert trainer.model is model
    assert_same_run(trainer, straight)
    assert trainer.state.log_history[SWITCH] == straight.state.log_history[SWITCH]


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "frobenius_decay": ["qk"]},
        {"optim": "flambe", "frobenius_decay": ["ov", "linear", "embedding"]},
    ],
    ids=["adamw", "flambe"],
)
def test_going_on_with_a_model_of_ours_whose_heads_are_cut(tmp_path, options):
    options = {**SAVING, **options, "factorize": factorize_bert}
    first = low_rank_trainer(tmp_path / "first", tiny_bert(), **options)
    first.train()
    for step in (SWITCH, SWITCH + 1):
        again = low_rank_trainer(tmp_path / "again", tiny_bert(seed=5), **options)
        again.train(resume_from_checkpoint=checkpoint(first, step))
        assert_same_run(again, first)


def test_the_same_trainer_goes_back_to_its_dense_phase(tmp_path):
    trainer = low_rank_trainer(tmp_path, **SAVING)
    trainer.train()
    before = losses(trainer), weights(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint(trainer, 2))
    assert losses(trainer) == before[0]
    assert all(torch.equal(weight, before[1][name]) for name, weight in weights(trainer.model).items())


def test_going_on_from_the_newest_checkpoint_leaves_frozen_weights_frozen(tmp_path):
    runs = []
    for resume in (None, True):
        model = partly_frozen()
        trainer = low_rank_trainer(
            tmp_path, model, optim="lamb", frobenius_decay=["none"], **{**SAVING, "save_steps": 5}
        )
        trainer.train(resume_from_checkpoint=resume)
        runs.append(trainer)
    assert_same_run(*runs)
    mlp = runs[1].model.transformer.h[0].mlp
    assert not any(parameter.requires_grad for parameter in mlp.parameters())
    assert factorized(mlp) == 2


def test_a_trainer_of_transformers_goes_on_with_the_model_in_the_form_of_the_checkpoint(tmp_path):
    def plain(folder: Path, model: GPT2LMHeadModel) -> Trainer:
        options = {**DEFAULTS, "save_strategy": "steps", "save_steps": 1}
        callback = DenseThenLowRank(SWITCH, factorize_gpt2, lr_scale=0.5)
        args = TrainingArguments(output_dir=str(folder), **options, dataloader_pin_memory=False)
        return Trainer(model, args, train_dataset=tiny_texts(), callbacks=[callback])

    first = plain(tmp_path / "first", tiny_gpt2())
    first.train()
    assert factorized(first.model) == 6
    for step in (SWITCH - 1, SWITCH, SWITCH + 1):
        again = plain(tmp_path / "again", tiny_gpt2(seed=5))
        match_checkpoint_(again.model, checkpoint(first, step))
        again.train(resume_from_checkpoint=checkpoint(first, step))
        assert_same_run(again, first)


def test_the_learning_rate_is_scaled_from_the_switch_on(tmp_path):
    rates = []
    for scale in (1.0, 0.5):
        trainer = low_rank_trainer(tmp_path, lr_scheduler_type="cosine", low_rank_lr_scale=scale)
        trainer.train()
        rates.append([entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry])
        assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {0.02 * scale}
    assert rates[1] == pytest.approx([rate * (1 if step < SWITCH else 0.5) for step, rate in enumerate(rates[0])])


def test_the_rate_of_the_low_rank_phase_is_that_of_the_run(straight, tmp_path, caplog):
    low_rank_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=checkpoint(straight, SWITCH + 1))
    assert "not from this run" not in caplog.text


def test_the_switch_takes_no_random_numbers(straight, tmp_path):
    def draw_and_factorize(model: nn.Module) -> None:
        torch.rand(7)
        factorize_gpt2(model)

    trainer = low_rank_trainer(tmp_path, factorize=draw_and_factorize, low_rank_lr_scale=0.5)
    trainer.train()
    assert_same_run(trainer, straight)


def test_at_full_rank_the_loss_of_the_next_step_is_that_of_the_dense_run(tmp_path):
    options = {"optim": "sgd", "frobenius_decay": ["none"], "learning_rate": 0.1}
    full = functools.partial(factorize_, config=FactorizationConfig(rank_scale=1.0, include=["*.c_attn", "*.mlp.*"]))
    switched = low_rank_trainer(tmp_path, factorize=full, **options)
    switched.train()
    dense = low_rank_trainer(tmp_path, factorize=None, dense_steps=0, **options)
    dense.train()
    assert losses(switched)[: SWITCH + 1] == pytest.approx(losses(dense)[: SWITCH + 1], rel=1e-5)
    assert losses(switched)[SWITCH:] != losses(dense)[SWITCH:]


def test_diagnostics_follow_the_products(tmp_path):
    trainer = low_rank_trainer(tmp_path, diagnostics_steps=1, **SAVING)
    trainer.train()
    lines = (tmp_path / DIAGNOSTICS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [4, 5, 6]
    assert len(records[0]["products"]) == 6
    again = low_rank_trainer(tmp_path, diagnostics_steps=1, **SAVING)
    again.train(resume_from_checkpoint=checkpoint(trainer, 4))
    assert (tmp_path / DIAGNOSTICS_FILE).read_text().splitlines() == lines


def run_worker(folder: Path, processes: int, batch_size: int) -> dict:
    folder.mkdir()
    codes, output = launch(WORKER, str(folder), str(batch_size), processes=processes)
    assert not any(codes), output
    return json.loads((folder / "facts.json").read_text()) | {"weights": torch.load(folder / "weights.pt")}


@launches
def test_two_processes_give_the_losses_and_weights_of_one(tmp_path):
    one = run_worker(tmp_path / "one", processes=1, batch_size=8)
    two = run_worker(tmp_path / "two", processes=2, batch_size=4)
    assert (two["world_size"], two["wrapper"], two["largest_difference"]) == (2, "DistributedDataParallel", 0.0)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_steps": -1}, "dense_steps must not be negative, got -1"),
        ({"dense_steps": 6, "max_steps": 6}, "dense_steps must be below max_steps=6, got 6"),
        ({"dense_steps": 3, "low_rank_lr_scale": 0.0}, "low_rank_lr_scale must be positive, got 0.0"),
        ({"low_rank_lr_scale": 0.5}, "low_rank_lr_scale=0.5 needs dense_steps"),
    ],
    ids=["negative", "too long", "scale", "scale alone"],
)
def test_bad_arguments_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factorize": None}, r"need each other, got only dense_steps=3"),
        ({"dense_steps": 0}, r"need each other, got only factorize"),
    ],
    ids=["steps alone", "factorize alone"],
)
def test_steps_and_factorize_need_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        low_rank_trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1, "num_train_epochs": 0.5}, "a dense phase of 3 steps leaves none of 3"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "in a ReduceLROnPlateau; choose"),
        ({"frobenius_decay": ["conv"]}, "GPT2LMHeadModel has no product of kind conv; it has: linear"),
        (
            {"factorize": lambda model: None, "frobenius_decay": ["ov"]},
            "factorize left the GPT2LMHeadModel that it was given as it was",
        ),
        (
            {"factorize": functools.partial(factorize_, config=FactorizationConfig(rank=2, include=["x"]))},
            "no layer of GPT2",
        ),
    ],
    ids=["too long", "schedule", "kind", "unchanged", "pattern"],
)
def test_what_would_fail_at_the_switch_fails_at_the_start(tmp_path, options, message):
    trainer = low_rank_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert factorized(trainer.model) == 0


def test_a_frozen_product_that_is_to_be_decayed_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"c_fc cannot be decayed: .* is frozen"):
        low_rank_trainer(tmp_path, partly_frozen()).train()


def test_a_run_cannot_go_on_with_another_number_of_dense_steps(straight, tmp_path):
    for steps, step, form in ((2, 3, "dense"), (5, 4, "low-rank")):
        trainer = low_rank_trainer(tmp_path, dense_steps=steps)
        with pytest.raises(
            ValueError, match=f"the run is {form} at step {step}, and with a dense phase of {steps} steps"
        ):
            trainer.train(resume_from_checkpoint=checkpoint(straight, step))
        assert factorized(trainer.model) == 0


def test_what_a_dense_phase_does_not_go_with_is_refused(tmp_path):
    args = FLAMBeTrainingArguments(output_dir=str(tmp_path), **DEFAULTS, dense_steps=SWITCH)
    model = tiny_gpt2()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not work with an optimizer of your own"):
        FLAMBeTrainer(model, args, factorize=factorize_gpt2, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="does not work with model_init: pass a model"):
        FLAMBeTrainer(None, args, factorize=factorize_gpt2, model_init=lambda: tiny_gpt2())


@pytest.mark.parametrize(("flag", "engine"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")])
def test_engines_that_hold_the_dense_parameters_are_refused(tmp_path, monkeypatch, flag, engine):
    create = FLAMBeTrainer.create_accelerator_and_postprocess

    def create_with_engine(self):
        create(self)
        setattr(self, flag, True)

    monkeypatch.setattr(FLAMBeTrainer, "create_accelerator_and_postprocess", create_with_engine)
    with pytest.raises(ValueError, match=f"dense_steps does not work with {engine}"):
        low_rank_trainer(tmp_path)


def test_several_processes_need_our_trainer(tmp_path, monkeypatch):
    distributed = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    monkeypatch.setattr(low_rank_phase, "AcceleratorState", lambda: distributed)
    args = TrainingArguments(str(tmp_path), **DEFAULTS, dataloader_pin_memory=False)
    callback = DenseThenLowRank(SWITCH, factorize_gpt2)
    with pytest.raises(ValueError, match=r"a model cannot change under MULTI_CPU in this trainer; .* FLAMBeTrainer"):
        Trainer(tiny_gpt2(), args, train_dataset=tiny_texts(), callbacks=[callback]).train()


def test_a_best_model_of_another_form_is_not_loaded(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 500}
    args = TrainingArguments(str(tmp_path), **{**DEFAULTS, **best}, dataloader_pin_memory=False)
    callback = DenseThenLowRank(SWITCH, factorize_gpt2)
    data = {"train_dataset": tiny_texts(), "eval_dataset": tiny_texts(8)}
    for trainer in (
        Trainer(tiny_gpt2(), args, callbacks=[callback], **data),
        low_rank_trainer(tmp_path, **best),
    ):
        with pytest.raises(ValueError, match="load_best_model_at_end could load a dense checkpoint into factors: set"):
            trainer.train()


def test_a_dense_model_does_not_go_on_with_a_low_rank_run():
    state = TrainerState(global_step=4, max_steps=6, log_history=[{"step": 3, "low_rank_parameters": 1234}])
    optimizer = torch.optim.SGD(tiny_gpt2().parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    callback = DenseThenLowRank(SWITCH, factorize_gpt2, follow=lambda *_: None)
    args = SimpleNamespace(load_best_model_at_end=False)
    with pytest.raises(ValueError, match=r"the model has 2,\d+ parameters and had 1,234 when it became low-rank: call"):
        callback.on_train_begin(args, state, None, model=tiny_gpt2(), lr_scheduler=schedule)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "at least 1 step, got 0"), ({"steps": 2, "lr_scale": -1.0}, "lr_scale must be positive, got -1.0")],
    ids=["steps", "scale"],
)
def test_the_callback_checks_its_options(options, message):
    with pytest.raises(ValueError, match=message):
        DenseThenLowRank(factorize=factorize_gpt2, **options)


def test_a_model_that_is_none_of_transformers_cannot_be_brought_into_a_checkpoints_form(straight, tmp_path):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_gpt2()

        def forward(self, input_ids, labels):
            return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}

    trainer = low_rank_trainer(tmp_path, Wrapped())
    with pytest.raises(ValueError, match="Wrapped is no model of Transformers, and its checkpoint does not tell"):
        trainer.train(resume_from_checkpoint=checkpoint(straight, 4))
