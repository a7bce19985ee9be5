"""FLAMBeTrainer: which optimizer runs, what it decays, and that splitting or interrupting a run changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_cases import losses, tiny_examples, tiny_model, tiny_trainer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
)

from hf_fnl import (
    FactorizationConfig,
    FactorizedGPT2LMHeadModel,
    FactorizedLinear,
    FactorizedLlamaForCausalLM,
    FLAMBe,
    FLAMBeTrainer,
    FLAMBeTrainingArguments,
    FrobeniusDecay,
    Lamb,
    diagnose,
    factorize_,
    find_products,
    merge_,
    parameter_groups,
)
from hf_fnl.training.callbacks import DIAGNOSTICS_FILE


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_close(first: dict, second: dict, **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name in first:
        # The gradient of a key's bias is zero but for rounding, which Adam's normalization blows up.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(first[name], second[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("optim", "expected"),
    [("flambe", FLAMBe), ("lamb", Lamb), ("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD)],
)
def test_the_chosen_optimizer_is_the_one_that_runs(tmp_path, optim, expected):
    trainer = tiny_trainer(tmp_path, optim=optim, max_steps=1)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is expected


STALE = "the optimizer holds {} parameters that the BertForPreTraining no longer has .*build the optimizer after"
LOW = FactorizationConfig(rank=4, include=("*.intermediate.*",))


def given(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> FLAMBeTrainer:
    options = {"use_cpu": True, "report_to": "none", "max_steps": 1, "disable_tqdm": True, "save_strategy": "no"}
    args = FLAMBeTrainingArguments(folder, **options)
    return FLAMBeTrainer(model, args, optimizers=(optimizer, None), train_dataset=tiny_examples())


@pytest.mark.parametrize(
    ("change", "named"), [(lambda m: factorize_(m, LOW), True), (merge_, False)], ids=["factorized", "merged"]
)
def test_an_optimizer_of_parameters_that_surgery_replaced_is_refused(tmp_path, change, named):
    model = tiny_model(stock=True)
    if change is merge_:
        factorize_(model, LOW)
    optimizer = torch.optim.SGD(model.named_parameters() if named else model.parameters(), lr=0.1)
    trainer = given(model, optimizer, tmp_path)
    change(model)
    message = STALE.format(2 if change is not merge_ else 4)
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train()
    old, new = ("U", "weight") if change is merge_ else ("weight", "U")
    assert f"and not its bert.encoder.layer.0.intermediate.dense.{new}" in str(caught.value)
    if named:
        assert f"no longer has (bert.encoder.layer.0.intermediate.dense.{old}" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        given(model, optimizer, tmp_path)


def test_so_is_the_optimizer_of_a_first_training(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(stock=True), max_steps=1)
    trainer.train()
    factorize_(trainer.model, LOW)
    with pytest.raises(ValueError, match=STALE.format(2)):
        trainer.train()


def test_an_optimizer_of_a_part_or_with_more_is_taken(tmp_path):
    model = tiny_model(stock=True)
    part = torch.optim.SGD(model.bert.pooler.parameters(), lr=0.1)
    more = torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.ones(3))], lr=0.1)
    for optimizer in (part, more):
        given(model, optimizer, tmp_path).train()


def test_flambe_decays_ov_products_and_matrices_but_no_vectors(tmp_path):
    trainer = tiny_trainer(tmp_path, weight_decay=0.1, frobenius_coefficient=0.3)
    optimizer = trainer.create_optimizer()
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    factors = {name for p in find_products(trainer.model, ["ov"]) for name in p.parameter_names}
    for name, parameter in trainer.model.named_parameters():
        expected = 0.3 if name in factors else 0.1 if parameter.ndim > 1 else 0.0
        assert decay[name] == expected, name


def test_flambe_trains_a_stock_model(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_model(stock=True), max_steps=20)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, FLAMBe)
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_penalty_and_coupled_decay_are_the_same_for_sgd(tmp_path):
    options = {"optim": "sgd", "frobenius_decay": ["linear", "ov"], "learning_rate": 0.05, "max_steps": 3}
    runs = []
    for mode, accumulation in (("penalty", 1), ("coupled", 1), ("penalty", 2)):
        trainer = tiny_trainer(
            tmp_path,
            frobenius_mode=mode,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        trainer.train()
        runs.append(weights(trainer))
    assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)
    assert_close(runs[0], runs[2], rtol=1e-5, atol=1e-6)
    plain = tiny_trainer(tmp_path, **{**options, "frobenius_decay": ["none"]}, frobenius_mode="coupled")
    plain.train()
    moved = max((weights(plain)[name] - runs[0][name]).abs().max() for name in runs[0])
    assert moved > 1e-4


def own_loss(outputs, labels, num_items_in_batch):
    logits = outputs["prediction_logits"].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("stock", "function", "is_scaled"),
    [(True, own_loss, None), (False, own_loss, None), (False, None, False), (True, None, True)],
    ids=["own loss", "own loss, and the model could", "said of a mean", "said of a sum"],
)
def test_a_penalty_is_that_of_coupled_decay_however_the_loss_is_scaled(tmp_path, stock, function, is_scaled):
    if is_scaled is not None and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        pytest.skip("this Transformers does not ask what a loss is")
    options = {"frobenius_decay": ["ov"], "frobenius_coefficient": 0.3, "learning_rate": 0.05, "max_steps": 2}
    runs = []
    for mode in ("penalty", "coupled"):
        model = tiny_model(stock=stock)
        args = tiny_trainer(
            tmp_path, model, optim="sgd", frobenius_mode=mode, gradient_accumulation_steps=2, **options
        ).args
        trainer = FLAMBeTrainer(model, args, train_dataset=tiny_examples(), compute_loss_func=function)
        trainer.loss_is_scaled_for_ga = is_scaled
        trainer.train()
        runs.append(weights(trainer))
    assert_close(*runs, rtol=1e-5, atol=1e-6)


def test_a_decay_that_a_given_optimizer_does_not_apply_is_refused(tmp_path):
    options = {"optim": "sgd", "frobenius_decay": ["ov"], "use_cpu": True, "report_to": "none"}
    model = tiny_model()
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    with pytest.raises(ValueError, match="frobenius_mode=coupled is applied by the optimizer, and the one that was gi"):
        FLAMBeTrainer(
            model, FLAMBeTrainingArguments(tmp_path, frobenius_mode="coupled", **options), optimizers=optimizers
        )
    FLAMBeTrainer(model, FLAMBeTrainingArguments(tmp_path, frobenius_mode="penalty", **options), optimizers=optimizers)


def test_so_is_one_that_a_class_of_optimizers_does_not_apply(tmp_path):
    args = tiny_trainer(tmp_path, optim="sgd", frobenius_decay=["ov"], frobenius_mode="coupled").args
    with pytest.raises(ValueError, match="frobenius_mode=coupled is applied by the optimizer"):
        FLAMBeTrainer(tiny_model(), args, optimizer_cls_and_kwargs=(torch.optim.SGD, {}))
    FLAMBeTrainer(tiny_model(), args, optimizer_cls_and_kwargs=None)  # as a subclass of both trainers hands it on


class OwnLoss(FLAMBeTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnStep(FLAMBeTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model.train(), inputs)
        self.accelerator.backward(loss)
        return loss.detach()


class OwnOptimizer(FLAMBeTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


@pytest.mark.parametrize(
    ("kind", "mode", "message"),
    [
        (OwnLoss, "penalty", "the compute_loss of this trainer does not call that of FLAMBeTrainer"),
        (OwnStep, "coupled", "the training_step of this trainer does not call that of FLAMBeTrainer"),
        (OwnOptimizer, "coupled", "is applied by the optimizer"),
        (OwnOptimizer, "decoupled", "is applied by the optimizer"),
    ],
)
def test_a_subclass_that_leaves_the_decay_out_is_refused_before_anything_moves(tmp_path, kind, mode, message):
    args = tiny_trainer(tmp_path, optim="sgd", frobenius_decay=["ov"], frobenius_mode=mode).args
    trainer = kind(tiny_model(), args, train_dataset=tiny_examples())
    before = {name: value.clone() for name, value in weights(trainer).items()}
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert_close(weights(trainer), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "mode"), [(OwnLoss, "coupled"), (OwnStep, "penalty"), (OwnLoss, "decoupled"), (OwnStep, "decoupled")]
)
def test_a_subclass_that_leaves_the_decay_in_trains(tmp_path, kind, mode):
    args = tiny_trainer(tmp_path, optim="sgd", frobenius_decay=["ov"], frobenius_mode=mode, max_steps=2).args
    kind(tiny_model(), args, train_dataset=tiny_examples()).train()


def test_a_subclass_builds_its_own_optimizer_and_goes_on_with_it(tmp_path):
    options = {"optim": "sgd", "frobenius_decay": ["none"], "save_strategy": "steps", "save_steps": 2}
    args = tiny_trainer(tmp_path, **options).args
    straight = OwnOptimizer(tiny_model(), args, train_dataset=tiny_examples())
    straight.train()
    resumed = OwnOptimizer(tiny_model(), args, train_dataset=tiny_examples())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(weights(resumed), weights(straight), rtol=0, atol=0)


@pytest.mark.parametrize("left_out", [None, "labels"], ids=["two losses", "no labels"])
def test_labels_that_are_not_smoothed_are_refused(tmp_path, left_out):
    examples = [{name: value for name, value in each.items() if name != left_out} for each in tiny_examples()]
    trainer = tiny_trainer(tmp_path, label_smoothing_factor=0.1)
    trainer.train_dataset = examples
    with pytest.raises(ValueError, match="label_smoothing_factor smooths labels of one output, and those of these ba"):
        trainer.train()


@pytest.mark.parametrize(("optim", "accumulation"), [("sgd", 2), ("lamb", 1)])
def test_coupled_decay_is_clipped_as_the_gradient_of_a_penalty_is(tmp_path, optim, accumulation):
    """Weights and logged norms agree; both runs clip, and decay is a large part of what is clipped."""
    options = {
        "optim": optim,
        "frobenius_decay": ["linear", "ov", "qk"],
        "frobenius_coefficient": 0.3,
        "max_grad_norm": 0.2,
        "max_steps": 3,
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    runs, norms = [], []
    for mode in ("penalty", "coupled"):
        trainer = tiny_trainer(tmp_path, frobenius_mode=mode, **options)
        trainer.train()
        runs.append(weights(trainer))
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
    plain = tiny_trainer(tmp_path, **{**options, "frobenius_decay": ["none"]})
    plain.train()
    without = [entry["grad_norm"] for entry in plain.state.log_history if "grad_norm" in entry]
    assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > 0.2
    assert abs(without[0] - norms[0][0]) > 0.1 * norms[0][0]


def test_coupled_decay_is_scaled_as_gradients_are():
    layer = FactorizedLinear(7, 5, 3)
    model = torch.nn.Sequential(layer)
    products = find_products(model, ["linear"])
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    decay = FrobeniusDecay(optimizer, products, 0.3, mode="coupled")
    decay.remove()
    gradients = []
    for scale in (1.0, 1024.0):
        optimizer.zero_grad()
        (scale * model(torch.ones(2, 7)).sum()).backward()
        decay.add_gradients_(scale)
        gradients.append({name: p.grad / scale for name, p in model.named_parameters()})
    optimizer.zero_grad()
    (model(torch.ones(2, 7)).sum() + decay.penalty()).backward()
    for found in gradients:
        assert_close(found, {name: p.grad for name, p in model.named_parameters()})


def adapted_model() -> torch.nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(r=3, target_modules=["query"], init_lora_weights=False))


@pytest.mark.parametrize(
    "make", [tiny_model, adapted_model, lambda: tiny_model(stock=True)], ids=["ours", "peft", "stock"]
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft 0.21
def test_accumulated_parts_equal_one_batch(tmp_path, make, request):
    whole = tiny_trainer(tmp_path, make(), per_device_train_batch_size=8, optim="lamb")
    parts = tiny_trainer(tmp_path, make(), per_device_train_batch_size=2, gradient_accumulation_steps=4, optim="lamb")
    whole.train()
    parts.train()
    if "stock" in request.node.name:  # Averages over each part by itself, and parts hold different numbers of labels.
        assert losses(parts) == pytest.approx(losses(whole), rel=0.1)
    else:
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
        assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-4)


SMALL = {"vocab_size": 29, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TWO_SIDES = {"vocab_size": 29, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
STOCK = {
    "masked": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0)),
    "causal": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "sequences": lambda: BartForConditionalGeneration(BartConfig(**TWO_SIDES)),
}


@pytest.mark.parametrize("kind", STOCK)
def test_losses_of_parts_are_averaged_whether_the_model_divides_by_all_labels_or_by_its_own(tmp_path, kind):
    ids = torch.randint(3, 29, (8, 7), generator=torch.Generator().manual_seed(0))
    examples = [{"input_ids": row, "labels": row} for row in ids]  # as many labels in each half
    found = []
    for parts in (1, 2):
        torch.manual_seed(0)
        options = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 2}
        trainer = tiny_trainer(tmp_path, STOCK[kind](), **options, frobenius_decay="none", optim="sgd")
        trainer.train_dataset = examples
        trainer.train()
        found.append((losses(trainer), weights(trainer)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ours", [FactorizedLlamaForCausalLM, FactorizedGPT2LMHeadModel])
def test_labels_of_causal_models_are_shifted_before_they_are_smoothed(tmp_path, ours):
    torch.manual_seed(0)
    model = ours(ours.config_class(vocab_size=29, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    ids = torch.randint(29, (8, 7))
    logits = model.eval()(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.3)
    trainer = tiny_trainer(tmp_path, model, label_smoothing_factor=0.3)
    trainer.eval_dataset = [{"input_ids": row, "labels": row} for row in ids]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_an_evaluation_keeps_the_last_batch_that_training_drops(tmp_path):
    trainer = tiny_trainer(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=8)
    eleven = list(tiny_examples())[:11]
    loaders = trainer.get_eval_dataloader(eleven), trainer.get_test_dataloader(eleven)
    assert [[len(batch["labels"]) for batch in loader] for loader in loaders] == [[8, 3], [8, 3]]
    trainer.train_dataset = eleven
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [8]
    assert trainer.args.dataloader_drop_last


def test_diagnostics_are_logged_and_survive_a_resume(tmp_path):
    options = {"diagnostics_steps": 2, "save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    trainer = tiny_trainer(tmp_path, **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "ov/effective_rank" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    assert len(losses(trainer)) == 4
    with (tmp_path / DIAGNOSTICS_FILE).open("a") as file:
        file.write('{"step": 4, "prod')  # a run that was killed
    again = tiny_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    records = [json.loads(line) for line in (tmp_path / DIAGNOSTICS_FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2, 4]
    assert list(records[0]["products"]) == [p.name for p in find_products(trainer.model, ["ov"])]


def test_a_step_size_is_that_of_the_group_of_the_product(tmp_path):
    model = tiny_model()
    products = find_products(model, ["ov"])
    groups = parameter_groups(model, weight_decay=0.1, products=products)
    for group, rate in zip(groups, (0.01, 0.02, 0.03), strict=True):
        group["lr"] = rate
    args = tiny_trainer(tmp_path, model, diagnostics_steps=1, max_steps=1).args
    trainer = FLAMBeTrainer(
        model, args, train_dataset=tiny_examples(), optimizers=(FLAMBe(groups, products=products), None)
    )
    trainer.train()
    logged = [
        entry["ov/effective_step_size"] for entry in trainer.state.log_history if "ov/effective_step_size" in entry
    ]
    figures = diagnose(model, products, learning_rate=0.03)
    assert logged[-1] == pytest.approx(sum(each["effective_step_size"] for each in figures.values()) / len(figures))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "flambee"}, "optim must be flambe, lamb or one of Transformers' optimizers, got 'flambee'"),
        ({"frobenius_decay": ["vo"]}, "frobenius_decay must be any of linear, embedding, conv, .* got 'vo'"),
        ({"frobenius_decay": ["none"]}, "set optim=lamb"),
        ({"frobenius_mode": "coupled"}, "frobenius_mode=coupled is for the other optimizers"),
        ({"optim": "sgd", "frobenius_mode": "hard"}, "frobenius_mode must be one of penalty, coupled, decoupled"),
        ({"frobenius_coefficient": -0.1}, "frobenius_coefficient must not be negative, got -0.1"),
        ({"diagnostics_steps": -1}, "diagnostics_steps must not be negative, got -1"),
    ],
    ids=["optim", "kind", "flambe without products", "flambe's mode", "mode", "coefficient", "diagnostics"],
)
def test_bad_arguments_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FLAMBeTrainingArguments(output_dir=str(tmp_path), **options)


def test_a_kind_that_the_model_lacks_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="BertForPreTraining has no product of kind embedding; it has: ov, qk"):
        tiny_trainer(tmp_path, tiny_model(stock=True), frobenius_decay=["ov", "embedding"])


def test_no_private_method_of_the_trainer_is_overridden():
    """What a library does not promise it changes; see the design, principle 2."""
    private = {name for name in dir(Trainer) if name.startswith("_") and not name.startswith("__")}
    assert private & vars(FLAMBeTrainer).keys() == set()
    assert FLAMBeTrainer.__bases__ == (Trainer,)


def test_processes_that_would_each_train_alone_are_refused(tmp_path, monkeypatch):
    args = FLAMBeTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to=[])
    monkeypatch.setenv("WORLD_SIZE", "2")  # only now: accelerate would remember it for the tests to come
    with pytest.raises(ValueError, match="launcher started 2 processes, and each would train its own model"):
        args._check_processes()
    assert not (tmp_path / "out").exists()
