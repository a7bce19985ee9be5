"""Recorded norms of products, and a run that keeps to them."""

from __future__ import annotations

import pytest
import torch
from training_cases import tiny_model, tiny_trainer
from transformers import TrainerCallback

from hf_fnl import find_products
from hf_fnl.vision.norms import NORMS_FILE, FollowNorms, RecordNorms, read_norms

KINDS = ["linear", "ov"]  # one of them with a norm for each head


class Watch(TrainerCallback):
    """The norms after each step, taken from the matrices themselves."""

    def __init__(self, products):
        self.products, self.norms = products, []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.norms.append([product.matrix(model).norm().item() for product in self.products])


def run(folder, *callbacks_of, resume=None, seed=0, **options):
    """Train the tiny model with callbacks, each made from its products."""
    model = tiny_model(seed=seed)
    products = find_products(model, KINDS)
    trainer = tiny_trainer(folder, model, **options)
    watch = Watch(products)
    for callback in [*(make(products) for make in callbacks_of), watch]:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, torch.tensor(watch.norms)


def test_what_is_recorded_are_the_norms_after_each_step(tmp_path):
    trainer, norms = run(tmp_path, RecordNorms)
    names, recorded = read_norms(tmp_path)
    assert names == [product.name for product in find_products(trainer.model, KINDS)]
    assert recorded.shape == (6, len(names))
    assert torch.allclose(recorded, norms, rtol=1e-5)


def test_a_run_keeps_to_the_norms_of_another(tmp_path):
    _, other = run(tmp_path / "first", RecordNorms, weight_decay=0.3)
    _, free = run(tmp_path / "free", seed=1, weight_decay=0.0)
    _, held = run(tmp_path / "held", lambda products: FollowNorms(products, tmp_path / "first"), seed=1)
    assert not torch.allclose(free, other, rtol=1e-2)
    assert torch.allclose(held, other, rtol=1e-5)


def test_a_broken_off_run_goes_on_with_its_record(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path / "whole", RecordNorms, **options)
    run(tmp_path / "part", RecordNorms, **options)
    run(tmp_path / "part", RecordNorms, resume=str(tmp_path / "part" / "checkpoint-2"), **options)
    assert torch.equal(read_norms(tmp_path / "part")[1], read_norms(tmp_path / "whole")[1])


def test_bad_input_is_named(tmp_path):
    products = find_products(tiny_model(), KINDS)
    with pytest.raises(FileNotFoundError, match=f"{NORMS_FILE}: train that run with --record_norms true"):
        FollowNorms(products, tmp_path)
    run(tmp_path, RecordNorms)
    with pytest.raises(ValueError, match=r"has other products: .*\.ov is only in one of both"):
        FollowNorms(find_products(tiny_model(), ["linear"]), tmp_path)
    with pytest.raises(ValueError, match="recorded 6 steps, and this one has 7"):
        run(tmp_path / "longer", lambda products: FollowNorms(products, tmp_path), max_steps=7)
