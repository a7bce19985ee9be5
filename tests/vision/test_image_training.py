"""Options of image training, the schedule in steps, and batches that are prepared on their device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_fnl.vision.image_training import ImageTrainer, ImageTrainingArguments, step_schedule, steps_per_epoch


class Images(torch.utils.data.Dataset):
    """Random bytes with labels."""

    def __init__(self, count=12):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.randint(0, 256, (count, 1, 5, 5), dtype=torch.uint8, generator=generator)

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": index % 3}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(25, 3)
        self.norm = nn.LayerNorm(25)

    def forward(self, pixel_values, labels=None):
        logits = self.linear(self.norm(pixel_values.flatten(1)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


def arguments(folder, **options):
    defaults = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    return ImageTrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        pytest.param({}, [1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01], id="papers"),
        pytest.param({"lr_milestones": [0.3], "lr_gamma": 0.2}, [1, 1, 1, *[0.2] * 7], id="one-milestone"),
        pytest.param({"warmup_epochs": 1}, [0.1, 0.1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01], id="warm-up"),
        pytest.param({"lr_milestones": [], "warmup_epochs": 2, "warmup_factor": 0.5}, [0.5] * 4 + [1] * 6, id="none"),
    ],
)
def test_the_schedule_goes_in_steps(tmp_path, options, factors):
    args = arguments(tmp_path, num_train_epochs=5, per_device_train_batch_size=8, **options)
    factor = step_schedule(args, 10, num_images=13)
    assert [factor(step) for step in range(10)] == pytest.approx(factors)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_epochs_have_the_steps_of_the_trainer(tmp_path, accumulation, drop_last):
    options = {"gradient_accumulation_steps": accumulation, "dataloader_drop_last": drop_last, "num_train_epochs": 1}
    args = arguments(tmp_path, **options, save_strategy="no", eval_strategy="no")
    trainer = ImageTrainer(
        Classifier(), args, transform=lambda images, training: images.float(), train_dataset=Images(13)
    )
    trainer.train()
    assert trainer.state.global_step == steps_per_epoch(args, 13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"norms_from": "runs/fd"}, "decay=normalized and norms_from", id="idle-norms"),
        pytest.param({"lr_milestones": [0.5, 1.0]}, r"shares between 0 and 1, got \[0.5, 1.0\]", id="milestone"),
        pytest.param(
            {"lr_scheduler_type": "cosine", "lr_milestones": [0.5]}, "does not go with lr_milestones", id="both"
        ),
        pytest.param({"lr_scheduler_type": "cosine", "warmup_epochs": 1}, "use warmup_steps", id="warm-up"),
        pytest.param({"warmup_steps": 5}, "constant has no warmup_steps, got 5: use warmup_epochs", id="warm-up-steps"),
        pytest.param({"optim": "adamw_torch", "momentum": 0.8}, "momentum and nesterov are those of", id="momentum"),
        pytest.param({"optim_args": "momentum=0.5", "nesterov": True}, "momentum and nesterov are", id="nesterov"),
        pytest.param({"lr_gamma": 0.0}, "lr_gamma must be positive", id="gamma"),
        pytest.param(
            {"lr_scheduler_type": "cosine", "lr_gamma": 0.2}, "lr_gamma=0.2 has no effect without", id="idle-gamma"
        ),
        pytest.param({"warmup_factor": 0.2}, "warmup_factor=0.2 has no effect without", id="idle-factor"),
        pytest.param({"dense_epochs": -1}, r"dense_epochs must be in \[0, num_train_epochs=4\)", id="dense-epochs"),
        pytest.param({"auto_find_batch_size": True, "dense_epochs": 1}, "changes how many steps", id="found-dense"),
        pytest.param({"auto_find_batch_size": True, "warmup_epochs": 1}, "changes how many steps", id="found-warm"),
        pytest.param({"dense_epochs": 4}, r"dense_epochs must be in \[0, num_train_epochs=4\)", id="all-dense"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


@pytest.mark.parametrize(
    ("decay", "frobenius_decay", "factor_decay"),
    [
        (None, ["linear"], "none"),
        ("weight", [], "weight"),
        ("frobenius", ["tensor"], "weight"),
        ("crs", [], "crs"),
        ("none", [], "none"),
        ("normalized", [], "none"),
    ],
)
def test_one_word_says_how_products_are_decayed(tmp_path, decay, frobenius_decay, factor_decay):
    norms = {"norms_from": "runs/fd"} if decay == "normalized" else {}
    args = arguments(tmp_path, frobenius_decay=["linear"], factor_decay="none", decay=decay, **norms)
    args.set_products({"tensor"}, 13)
    assert (args.frobenius_decay, args.factor_decay) == (frobenius_decay, factor_decay)


def test_training_is_torchs_sgd_over_transformed_batches(tmp_path):
    images, seen = Images(), []

    def transform(batch, *, training):
        assert batch.dtype == torch.uint8
        seen.append((training, len(batch)))
        return batch.float() / 255

    args = arguments(tmp_path, nesterov=True, weight_decay=0.1, warmup_epochs=1, per_device_train_batch_size=12)
    trainer = ImageTrainer(Classifier(), args, transform=transform, train_dataset=images, eval_dataset=images)
    trainer.train()
    assert seen == [(True, 12), (False, 12)] * 4

    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    for factor in (0.1, 1, 0.1, 0.01):
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        labels = torch.arange(12) % 3
        model(images.pixel_values.float() / 255, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in trainer.model.named_parameters():
        assert torch.allclose(parameter, model.get_parameter(name), atol=1e-6)


def test_a_second_training_has_its_milestones_too(tmp_path):
    options = {"lr_milestones": [0.5], "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    args = arguments(tmp_path, per_device_train_batch_size=12, num_train_epochs=2, **options)
    trainer = ImageTrainer(Classifier(), args, transform=lambda x, training: x.float(), train_dataset=Images())
    for _ in range(2):
        trainer.train()
        rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
        assert rates == pytest.approx([0.1, 0.01])


def test_what_follows_from_other_options_is_not_written(tmp_path):
    args = arguments(tmp_path, decay="frobenius", dense_epochs=1)
    args.set_products({"conv"}, 13)
    assert args.dense_steps == 4
    written = args.to_dict()
    assert {"momentum", "decay", "dense_epochs"} <= set(written)
    assert not {
        "lr_milestones",
        "optim_args",
        "frobenius_mode",
        "frobenius_decay",
        "factor_decay",
        "dense_steps",
    } & set(written)
