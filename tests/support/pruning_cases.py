"""A tiny image classifier and its trainer, for networks whose weights are held in other ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import QUIET
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments

CLASSES = 3
SIZES = {"stem": 5 * 2 * 9, "middle": 7 * 5 * 9, "head": CLASSES * 7}  # weights of the layers of TinyNet


class TinyNet(nn.Module):
    """Two convolutions, a normalization and dropout; with a loss, as models of Transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.middle = nn.Conv2d(5, 7, 3, bias=False)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        hidden = self.middle(self.norm(self.stem(pixel_values)).relu()).relu()
        logits = self.head(self.dropout(hidden.mean((2, 3))))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def tiny_net(seed: int = 0) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet()


def tiny_resnet(seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    sizes = {"num_channels": 2, "embedding_size": 6, "hidden_sizes": [6, 10], "depths": [1, 1]}
    return ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=CLASSES))


def batch(count: int = 11, size: int = 8, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 2, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(CLASSES, (count,), generator=generator)}


def tiny_images(count: int = 24) -> list[dict[str, Tensor]]:
    images = batch(count)
    return [{name: values[index] for name, values in images.items()} for index in range(count)]


def image_trainer(output_dir: str | Path, model: nn.Module, **options: Any) -> FLAMBeTrainer:
    """A trainer with strong decay and momentum, so that a weight that is not held would move."""
    defaults = {
        **QUIET,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
    }
    args = FLAMBeTrainingArguments(output_dir=str(output_dir), **{**defaults, **options})
    return FLAMBeTrainer(model, args, train_dataset=tiny_images(), eval_dataset=tiny_images()[:5])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
