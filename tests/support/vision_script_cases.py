"""Small runs of the vision script, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_fnl.layers import Factorized
from hf_fnl.scripts import train_vision
from hf_fnl.vision.models import vision_model

TINY = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "width": 3,
    "max_train_images": 88,
    "max_eval_images": 37,
    "per_device_train_batch_size": 24,
    "num_train_epochs": 2,  # of 4 steps
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 3,
    "eval_strategy": "no",
}
SCHEMES = ("channel", "tt")
OVERCOMPLETE = ("wide", "do_conv")
PRUNINGS = ("snip", "lottery")
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "rank-scale": {"rank_scale": 0.3, "decay": "frobenius"},
    **{scheme: {"ratio": 0.5, "conv_scheme": scheme, "decay": "frobenius"} for scheme in SCHEMES},
    **{kind: {"overcomplete": kind} for kind in OVERCOMPLETE},
    **{method: {"ratio": 0.4, "pruning": method} for method in PRUNINGS},
    "crops": {"resized_crops": True, "image_size": 8},
    "dense-first": {"rank_scale": 0.3, "decay": "frobenius", "dense_epochs": 1},
}
FILES = {"model.safetensors", "config.json", "preprocessor_config.json", "metrics.json", "run_config.json"}

Run = tuple[Path, dict[str, Any]]


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]


def train(folder: Path, **options: Any) -> dict[str, Any]:
    defaults = {name: value for name, value in TINY.items() if name != "width" or "init_from" not in options}
    return train_vision.main(flags({**defaults, "output_dir": folder, **options}))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read(folder, "trainer_state.json")["log_history"] if "loss" in entry]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def plain_network() -> nn.Module:
    """What the script builds for digits."""
    return vision_model("resnet20", num_labels=10, image_size=8, num_channels=1, width=3)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def products(model: nn.Module) -> dict[str, Factorized]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Factorized)}


def load(folder: Path) -> nn.Module:
    return AutoModelForImageClassification.from_pretrained(folder).eval()


def picture(size: int = 24, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8))


def parquet(path: Path, pictures: list[Image.Image], classes: tuple[str, ...] = ("ant", "bee", "cow")) -> Path:
    """A file of pictures whose classes go around."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(classes)))
    labels = [number % len(classes) for number in range(len(pictures))]
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(path)
    return path


def stock(folder: Path, **sizes: Any) -> Path:
    """A tiny network of Transformers, saved."""
    config = ResNetConfig(embedding_size=5, hidden_sizes=[8, 12], depths=[1, 1], **{"num_channels": 1, **sizes})
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder
