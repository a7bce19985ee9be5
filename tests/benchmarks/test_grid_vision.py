"""The training of image classifiers in grids: its step, its decays, its batches, and going on from a checkpoint."""

import copy
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks import grid, grid_runs
from benchmarks.training import vision
from benchmarks.training.common import Broken
from benchmarks.training.images import Batches, read_images
from hf_fnl import FrobeniusDecay

SMALL = [
    "--images",
    "digits",
    "--width",
    "4",
    "--limit",
    "96",
    "--batch-size",
    "32",
    "--epochs",
    "2",
    "--device",
    "cpu",
]
LOW_RANK = [*SMALL, "--rank-scale", "0.34"]


def session(out, *words):
    words = [*words, "--out", str(out)]
    return vision.Session(vision.parse(words), words)


def train(found):
    found.begin()
    return found.train()


@pytest.mark.parametrize("decay", ["none", "weight", "frobenius"])
def test_steps_equal_those_of_torchs_sgd_and_of_frobenius_decay(decay, tmp_path):
    training = session(tmp_path, *LOW_RANK, "--decay", decay, "--weight-decay", "0.1", "--compose", "always").training
    model = copy.deepcopy(training.model)
    factors = {name for product in training.products.all for name in product.parameter_names}
    named = dict(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if n in factors], "weight_decay": 0.1 * (decay == "weight")},
        {"params": [(n, p) for n, p in named.items() if n not in factors], "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    if decay == "frobenius":
        FrobeniusDecay(optimizer, training.products.all, 0.1, mode="coupled")
    training.batches.begin_epoch(0)
    training.rate.fill_(0.05)
    for _ in range(3):
        position = training.batches.position.clone()
        training.step()
        training.batches.position.copy_(position)
        images, labels = training.batches.take()
        optimizer.zero_grad()
        F.cross_entropy(model(pixel_values=images).logits, labels).backward()
        optimizer.step()
    for name, parameter in training.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], atol=2e-6, rtol=2e-5, msg=name)


def test_a_normalized_run_has_the_norms_of_the_run_that_it_follows(tmp_path):
    words = [*LOW_RANK, "--weight-decay", "0.05"]
    leader = train(session(tmp_path / "a", *words, "--decay", "frobenius"))
    names, norms = vision.read_norms(tmp_path / "a")
    assert norms.shape == (6, 18)
    follower = session(tmp_path / "b", *words, "--decay", "normalized", "--norms-from", str(tmp_path / "a"))
    result, model = train(follower), follower.training.model
    for product in follower.training.products.all:
        norm = product.frobenius_norm(model)
        torch.testing.assert_close(norm, norms[-1, names.index(product.name)], rtol=1e-5, atol=0)
    assert result["measures"]["frobenius_norm"] == pytest.approx(leader["measures"]["frobenius_norm"], rel=1e-5)
    assert result["measures"]["nuclear_norm"] != pytest.approx(leader["measures"]["nuclear_norm"], rel=1e-6)


def test_several_runs_in_one_process_are_what_they_are_alone(tmp_path):
    cases = {"a": [], "b": ["--decay", "frobenius"], "c": ["--decay", "frobenius", "--seed", "5"]}
    listed = [[*LOW_RANK, *words, "--out", str(tmp_path / name)] for name, words in cases.items()]
    broken = [*LOW_RANK, "--data", str(tmp_path), "--images", "cifar10", "--out", str(tmp_path / "broken")]
    (tmp_path / "several.json").write_text(json.dumps([*listed, broken]))
    assert vision.train_several(tmp_path / "several.json") == 1
    for name, words in cases.items():
        alone = train(session(tmp_path / f"{name}-alone", *LOW_RANK, *words))
        assert json.loads((tmp_path / name / "result.json").read_text())["measures"] == alone["measures"]
    assert "FileNotFoundError" in (tmp_path / "broken/log.txt").read_text()


@pytest.mark.parametrize("stop_after", [1, 4], ids=["within-the-first-epoch", "within-the-second"])
def test_a_run_that_was_broken_off_ends_as_one_that_was_not(stop_after, tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "AHEAD", 1)
    monkeypatch.setattr(vision, "EAGER_STEPS", 0)
    words = [*LOW_RANK, "--decay", "frobenius"]
    whole = session(tmp_path / "a", *words)
    expected = train(whole)
    broken = session(tmp_path / "b", *words)
    left = iter([False] * stop_after + [True])
    monkeypatch.setattr(broken.run, "must_stop", lambda: next(left))
    with pytest.raises(Broken, match=f"in epoch {1 + stop_after // 3} of 2"):
        train(broken)
    again = session(tmp_path / "b", *words)
    assert train(again)["measures"] == expected["measures"]
    torch.testing.assert_close(again.training.state(), whole.training.state(), rtol=0, atol=0)
    torch.testing.assert_close(
        vision.read_norms(tmp_path / "b")[1], vision.read_norms(tmp_path / "a")[1], rtol=0, atol=0
    )
    assert not (tmp_path / "b/checkpoint.pt").exists()


def test_replaying_is_checked_against_a_step(tmp_path):
    run = session(tmp_path, *LOW_RANK, "--decay", "weight")
    run.training.batches.begin_epoch(0)
    run.training.rate.fill_(0.1)
    assert vision.replay_difference(run.training, run.training.step) == 0
    assert run.training.count.item() == 1

    def wrong():
        run.training.rate.mul_(1.1)
        run.training.step()

    assert vision.replay_difference(run.training, wrong) == pytest.approx(0.1, abs=1e-3)
    assert run.training.count.item() == 2
    assert run.training.rate.item() == pytest.approx(0.1)


def test_a_dense_model_trains_too(tmp_path):
    measures = train(session(tmp_path, *SMALL))["measures"]
    assert set(measures) == {n + m for n in ("accuracy", "test_loss", "train_loss") for m in ("", "_mid")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--decay", "normalized"], "--norms-from need each other", id="nothing-to-follow"),
        pytest.param(["--decay", "frobenius"], "give --rank-scale", id="no-factors"),
        pytest.param(["--epochs", "0"], "at least 1, got 0", id="no-epochs"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        vision.parse([*words, "--out", str(tmp_path)])


def test_another_number_of_steps_cannot_be_followed(tmp_path):
    train(session(tmp_path / "a", *LOW_RANK, "--decay", "frobenius", "--epochs", "1"))
    with pytest.raises(ValueError, match="has 3 steps and 18 products, and this run 6 and 18"):
        session(tmp_path / "b", *LOW_RANK, "--decay", "normalized", "--norms-from", str(tmp_path / "a"))


def test_rates_fall_at_the_milestones(tmp_path):
    args = vision.parse(["--epochs", "8", "--out", str(tmp_path)])
    assert [vision.rate_at(args, epoch) for epoch in range(8)] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def batches(**options):
    pixels = np.random.default_rng(0).integers(1, 256, (7, 5, 6, 2), dtype=np.uint8)
    fixed = {"batch_size": 3, "crop_padding": 2, "flipped": True, "seed": 1, "device": torch.device("cpu")}
    return pixels, Batches(pixels, np.arange(7), **{**fixed, **options})


def test_a_batch_holds_mirrored_crops_of_different_images():
    pixels, found = batches()
    found.begin_epoch(3)
    mean, std = found.statistics
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen, places = [], set()
    for _ in range(found.steps):
        images, labels = found.take()
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, label in zip((images.permute(0, 2, 3, 1) * std + mean).round().byte().numpy(), labels, strict=True):
            crops = {
                (y, x, flip): padded[label, y : y + 5, x : x + 6][:, :: -1 if flip else 1]
                for y in range(5)
                for x in range(5)
                for flip in (False, True)
            }
            matching = [place for place, crop in crops.items() if np.array_equal(crop, image)]
            assert len(matching) == 1
            places.add(matching[0])
            seen.append(label.item())
    assert len(set(seen)) == len(seen) == 6
    assert len(places) > 3


def test_batches_depend_on_seed_and_epoch_only():
    def labels(seed, epoch):
        _, found = batches(seed=seed)
        found.begin_epoch(epoch)
        return torch.cat([found.take()[1] for _ in range(found.steps)]).tolist()

    assert labels(1, 2) == labels(1, 2)
    assert labels(1, 2) != labels(1, 3)
    assert labels(1, 2) != labels(2, 2)


def test_images_without_crops_are_normalized():
    _, found = batches(crop_padding=0, flipped=False, batch_size=7)
    found.begin_epoch(0)
    images, labels = found.take()
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(2))
    assert sorted(labels.tolist()) == list(range(7))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with 20 random images in each split, in the form of CIFAR-10, and no images kept from elsewhere."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "cifar10").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        files = [io.BytesIO() for _ in range(20)]
        for file in files:
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, format="png")
        table = {"img": [{"bytes": file.getvalue(), "path": None} for file in files], "label": np.arange(20) % 10}
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "cifar10" / f"{split}.parquet")
    return tmp_path


def test_decoded_images_are_kept(cifar):
    pixels, labels = read_images("cifar10", cifar, "train")
    assert pixels.shape == (20, 32, 32, 3)
    (kept,) = (cifar / "home/.cache/hf_fnl").iterdir()
    again = read_images("cifar10", cifar, "train")
    np.testing.assert_array_equal(again[0], pixels)
    np.testing.assert_array_equal(again[1], np.arange(20) % 10)
    assert kept.suffix == ".npz"
    assert labels.dtype == np.int64


def test_missing_images_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data names the folder"):
        read_images("cifar10", tmp_path, "train")


def test_a_grid_trains_it_without_datasets(cifar, monkeypatch):
    (cifar / "sitecustomize.py").write_text("import sys\nsys.modules.update(datasets=None, evaluate=None)\n")
    monkeypatch.setenv("PYTHONPATH", f"{cifar}:{grid_runs.ROOT}")
    plan = {
        "title": "t",
        "program": "benchmarks.training.vision",
        "options": {"width": 4, "rank-scale": 0.34, "batch-size": 10, "epochs": 1, "precision": "bf16"},
        "cells": {"fd": {"decay": "frobenius"}},
        "seeds": [0],
        "measures": ["accuracy", "bound_ratio"],
    }
    (cifar / "plan.yaml").write_text(json.dumps(plan))
    table = grid.main([str(cifar / "plan.yaml"), "--data", str(cifar), "--out", str(cifar / "out")])["plan"]
    log = (cifar / "out/plan/fd-s0/log.txt").read_text()
    assert table["done"] == 1, log
    assert table["cells"]["fd"]["bound_ratio"]["mean"] >= 1
    result = json.loads((cifar / "out/plan/fd-s0/result.json").read_text())
    assert result["options"]["precision"] == "bf16"
    assert result["commit"] == grid.commit()
    assert result["graph"] is False


@pytest.mark.parametrize(
    "path", sorted(grid_runs.PLANS.glob("k2*_resnet20*.yaml")) + sorted(grid_runs.PLANS.glob("k22*wrn*.yaml"))
)
def test_plans_have_options_that_the_program_knows(path, tmp_path):
    plan = grid.read_plan(path.stem)
    for tiny in (False, True):
        for run in grid.runs_of([plan], tmp_path, tiny=tiny):
            vision.parse([*run.flags, "--out", str(run.folder)])
    measured = {*vision.FIGURES, "bound_ratio", "accuracy", "train_loss", "test_loss"}
    assert {name.removesuffix("_mid") for name in [*plan.measures, *(pair[2] for pair in plan.pairs)]} <= measured
