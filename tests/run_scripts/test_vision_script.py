"""The vision script as a user runs it, in small: every way to hold a network's weights, resuming, what is refused."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from after_cases import check_next_steps, check_settings
from launching import SCRIPTS, launch, launches
from torch import Tensor, nn
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification
from vision_script_cases import (
    FILES,
    FORMS,
    OVERCOMPLETE,
    PRUNINGS,
    SCHEMES,
    TINY,
    Run,
    assert_same,
    count,
    flags,
    load,
    losses,
    parquet,
    picture,
    plain_network,
    products,
    read,
    stock,
    train,
    weights,
)

from hf_fnl.scripts import train_vision
from hf_fnl.vision.image_batches import ImageOptions
from hf_fnl.vision.image_training import ImageTrainingArguments
from hf_fnl.vision.images import load_images
from hf_fnl.vision.models import inner_convolutions, vision_model
from hf_fnl.vision.norms import read_norms


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Callable[[str], Run]:
    """Trains a form when it is first asked for."""

    @functools.cache
    def run(form: str) -> Run:
        folder = tmp_path_factory.mktemp(form) / "run"
        return folder, train(folder, **FORMS[form])

    return run


@pytest.mark.parametrize("form", FORMS)
def test_the_written_model_and_image_processor_give_what_was_measured(runs, form):
    folder, metrics = runs(form)
    assert {path.name for path in folder.iterdir()} >= FILES
    assert read(folder, "metrics.json") == metrics
    assert metrics["train_loss"] > 0
    records = load_images("digits", split="test", limit=37)
    images = AutoImageProcessor.from_pretrained(folder)(list(records), return_tensors="pt")
    with torch.no_grad():
        outputs = load(folder)(**images, labels=records.labels)
    assert outputs.loss.item() == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert (outputs.logits.argmax(-1) == records.labels).double().mean().item() == metrics["eval_accuracy"]


@pytest.mark.parametrize("form", ["rank-scale", "snip"])
def test_what_users_do_with_a_classifier(runs, form, tmp_path):
    folder, _ = runs(form)
    check_settings(folder, train_vision.ModelOptions, ImageOptions, ImageTrainingArguments)
    check_next_steps(folder, tmp_path / "out")


@pytest.mark.parametrize("form", ["rank-scale", *SCHEMES, "dense-first"])
def test_low_rank_runs_save_their_factors(runs, form):
    folder, metrics = runs(form)
    model, plain = load(folder), plain_network()
    assert metrics["parameters"]["total"] == count(model) < count(plain)
    assert metrics["parameters"]["dense_equivalent"] == count(plain)
    assert products(model).keys() <= set(inner_convolutions(plain))
    assert {layer.scheme for layer in products(model).values()} == {FORMS[form].get("conv_scheme", "spatial")}
    if "ratio" in FORMS[form]:
        assert count(model) / count(plain) == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("form", OVERCOMPLETE)
def test_overcomplete_runs_are_merged_into_the_plain_network(runs, form):
    folder, metrics = runs(form)
    plain = plain_network()
    assert metrics["parameters"]["total"] > count(plain) == metrics["merged"]["parameters"]
    assert metrics["parameters"]["dense_equivalent"] == count(plain)
    assert metrics["merged"]["largest_change_of_logits"] < 1e-4
    assert "quantization_config" not in read(folder, "config.json")
    assert weights(folder).keys() == plain.state_dict().keys()


@pytest.mark.parametrize("form", PRUNINGS)
def test_pruned_runs_are_saved_with_plain_weights_and_as_many_zeros_as_asked_for(runs, form):
    folder, metrics = runs(form)
    model, plain = load(folder), plain_network()
    assert metrics["parameters"]["nonzero"] == round(0.4 * count(plain))
    kernels = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = count(model) - sum(kernel.numel() for kernel in kernels)
    assert sum(int(kernel.count_nonzero()) for kernel in kernels) + vectors == round(0.4 * count(plain))
    assert weights(folder).keys() == plain.state_dict().keys()


def test_rounds_of_pruning_are_phases_of_one_run(tmp_path):
    metrics = train(tmp_path, ratio=0.3, pruning="lottery", pruning_rounds=2, num_train_epochs=1)
    left = [metrics[f"phase-{number}"]["parameters"]["nonzero"] for number in (1, 2, 3)]
    prunable = sum(parameter.numel() for parameter in plain_network().parameters() if parameter.ndim > 1)
    kept = [prunable - count(plain_network()) + nonzero for nonzero in left]
    assert kept[1] == round(math.sqrt(kept[0] * kept[2]))
    assert metrics["eval_loss"] == metrics["phase-3"]["eval_loss"]


def decay_gradients(model: nn.Module, decay: str) -> dict[str, Tensor]:
    """Gradients of half the squared norms that a decay holds down."""
    layers = list(products(model).values())
    factors = [factor for layer in layers for factor in layer.factors()]
    share = sum(factor.numel() for factor in factors) / sum(math.prod(layer.dense_shape) for layer in layers)
    if decay == "frobenius":
        squares = sum(layer.dense_weight().square().sum() for layer in layers)
    else:
        scale = {"weight": 1.0, "crs": share, "none": 0.0}[decay]
        squares = scale * sum(factor.square().sum() for factor in factors)
    squares += sum(p.square().sum() for p in model.parameters() if all(p is not factor for factor in factors))
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(squares / 2, parameters), strict=True))


@pytest.mark.parametrize("scheme", ["tt"])
def test_decay_is_that_of_the_option(tmp_path, scheme):
    step = {"max_steps": 1, "lr_milestones": 0.9, "momentum": 0, "learning_rate": 0.1, "save_strategy": "no"}
    step |= {"conv_scheme": scheme, "rank_scale": 0.3}
    train(tmp_path / "start", **{**step, "learning_rate": 0})
    train(tmp_path / "free", **step, weight_decay=0)
    start, free = load(tmp_path / "start"), weights(tmp_path / "free")
    for decay in ("weight", "frobenius", "crs", "none"):
        train(tmp_path / decay, **step, decay=decay, weight_decay=2)
        decayed = weights(tmp_path / decay)
        for name, gradient in decay_gradients(start, decay).items():
            torch.testing.assert_close((free[name] - decayed[name]) / 0.2, gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_a_normalized_run_keeps_to_the_norms_of_another(tmp_path):
    common = {"rank_scale": 0.3, "record_norms": True}
    train(tmp_path / "decayed", **common, decay="frobenius", weight_decay=0.1)
    train(tmp_path / "held", **common, decay="normalized", norms_from=tmp_path / "decayed", seed=1)
    names, norms = read_norms(tmp_path / "decayed")
    torch.testing.assert_close(read_norms(tmp_path / "held")[1], norms, rtol=1e-4, atol=0)
    layers = products(load(tmp_path / "held"))
    found = torch.stack([layers[name].dense_weight().norm() for name in names])
    torch.testing.assert_close(found, norms[-1], rtol=1e-4, atol=0)


def test_dense_epochs_come_before_the_low_rank_ones(runs):
    folder, metrics = runs("dense-first")
    assert count(load(folder / "checkpoint-3")) == count(plain_network())
    assert count(load(folder / "checkpoint-6")) == metrics["parameters"]["total"]
    switch = {"step": 4, "low_rank_parameters": metrics["parameters"]["total"]}
    assert switch in read(folder, "trainer_state.json")["log_history"]


@pytest.mark.parametrize(
    ("form", "step"),
    [
        ("rank-scale", 3),
        ("do_conv", 3),
        ("snip", 3),
        ("crops", 3),
        ("dense-first", 3),
        ("dense-first", 6),
    ],
)
def test_going_on_equals_never_having_stopped(runs, tmp_path, form, step):
    whole, metrics = runs(form)
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    last_phase = folder / "phase-2" if form == "lottery" else folder
    for number in {3, 6, 8} - set(range(step + 1)):
        shutil.rmtree(last_phase / f"checkpoint-{number}")
    for path in {last_phase / "metrics.json", last_phase / "model.safetensors", *(folder / name for name in FILES)}:
        path.unlink()
    with pytest.raises(ValueError, match="of an earlier run: set resume_from_checkpoint=true to go on from it"):
        train(folder, **FORMS[form])
    again = train(folder, **FORMS[form], resume_from_checkpoint=True)
    assert_same(weights(folder), weights(whole))
    assert again["eval_loss"] == metrics["eval_loss"]
    assert again["parameters"] == metrics["parameters"]


def test_going_on_from_a_trained_model(runs, tmp_path):
    folder, _ = runs("dense")
    still = {"learning_rate": 0, "max_steps": 1, "save_strategy": "no"}
    train(tmp_path / "dense", init_from=folder, **still)
    train(tmp_path / "factors", init_from=folder, rank_scale=1.0, **still)
    trained, dense = weights(folder), weights(tmp_path / "dense")
    for name, _ in plain_network().named_parameters():
        assert torch.equal(dense[name], trained[name]), name
    for name, layer in products(load(tmp_path / "factors")).items():
        torch.testing.assert_close(layer.dense_weight(), trained[f"{name}.weight"], rtol=1e-4, atol=1e-5)


@pytest.fixture
def one_picture(tmp_path) -> dict[str, Any]:
    """Options for data whose batches all have the same statistics, however they are split.

    At the rate of 0.1 a step multiplies what differs by rounding by some forty; at this one it does not, and twice the
    gradient changes the second loss by 6 percent.
    """
    path = parquet(tmp_path / "same.parquet", [picture()] * 24)
    data = {"dataset": path, "eval_dataset": path, "crop_padding": 0, "horizontal_flip": False}
    return {**data, "learning_rate": 0.01, "save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1}


@pytest.fixture(params=["ours", "transformers"])
def network(request, tmp_path) -> dict[str, Any]:
    """Options for a network of ours, or for one of Transformers'."""
    if request.param == "ours":
        return {"rank_scale": 0.3, "decay": "frobenius"}
    sizes = {"num_channels": 1, "embedding_size": 5, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3}
    torch.manual_seed(0)
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "stock")
    return {"init_from": tmp_path / "stock"}


def test_two_accumulation_steps_have_the_losses_of_one(one_picture, network, tmp_path):
    for steps in (1, 2):
        batch = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}
        train(tmp_path / str(steps), **one_picture, **network, **batch)
    assert len(losses(tmp_path / "1")) == 6
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)


@launches
def test_two_processes_train_and_merge_as_one(one_picture, tmp_path):
    options = {**one_picture, "overcomplete": "full", "decay": "frobenius"}
    one = train(tmp_path / "one", **options, per_device_train_batch_size=8)
    given = flags({**TINY, **options, "per_device_train_batch_size": 4, "output_dir": tmp_path / "two"})
    codes, output = launch(SCRIPTS / "train_vision.py", *given)
    assert not any(codes), output
    two = read(tmp_path / "two", "metrics.json")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert (two["parameters"], two["merged"]["parameters"]) == (one["parameters"], one["merged"]["parameters"])
    assert weights(tmp_path / "two").keys() == weights(tmp_path / "one").keys()


def test_its_own_configuration_repeats_a_run(runs, tmp_path):
    folder, _ = runs("rank-scale")
    settings = read(folder, "run_config.json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "run")}))
    train_vision.main([str(tmp_path / "config.yaml")])
    assert_same(weights(tmp_path / "run"), weights(folder))
    written = read(tmp_path / "run", "run_config.json")
    assert {**written, "output_dir": str(folder)} == read(folder, "run_config.json")


def test_a_classifier_for_other_classes_is_drawn_anew(tmp_path):
    source = stock(tmp_path / "stock", num_labels=7)
    train(tmp_path / "run", init_from=source, learning_rate=1e-9, num_train_epochs=1)
    before, after = weights(source), weights(tmp_path / "run")
    assert {name for name in after if before[name].shape != after[name].shape} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    kernels = [name for name in after if after[name].ndim == 4]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in kernels)
    assert load(tmp_path / "run").config.id2label == {number: str(number) for number in range(10)}


@pytest.mark.parametrize("scheme", ["spatial"])
def test_the_closest_ratio_that_is_named_can_be_met(tmp_path, scheme):
    with pytest.raises(ValueError, match="the closest ratio is") as caught:
        train(tmp_path / "run", ratio=0.01, conv_scheme=scheme)
    closest = float(str(caught.value).split()[-1])
    metrics = train(tmp_path / "run", ratio=closest, conv_scheme=scheme, max_steps=1)
    assert metrics["parameters"]["ratio"] == pytest.approx(closest, rel=0.01)


@pytest.mark.parametrize(
    ("names", "is_kept"),
    [
        pytest.param([str(digit) for digit in range(10)], True, id="same"),
        pytest.param([f"LABEL_{number}" for number in range(10)], True, id="unnamed"),
        pytest.param([str(9 - digit) for digit in range(10)], False, id="other-order"),
    ],
)
def test_a_classifier_of_other_classes_is_drawn_anew_though_they_are_as_many(
    tmp_path: Path, names: list[str], is_kept: bool
) -> None:
    network = vision_model("resnet20", num_labels=10, width=4, num_channels=1, id2label=dict(enumerate(names)))
    network.save_pretrained(tmp_path / "source")
    options = train_vision.ModelOptions(init_from=str(tmp_path / "source"))
    args = ImageTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")
    model = train_vision.Session(options, ImageOptions(max_train_images=50), args).build_model()
    assert torch.equal(model.classifier.weight, network.classifier.weight) == is_kept
    assert torch.equal(model.backbone.stem[0].weight, network.backbone.stem[0].weight)
