"""Tiny image classifiers of every family, with images, and the same networks as plain functions of their weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ResNetForImageClassification

from hf_fnl.vision.models import (
    CifarResNetForImageClassification,
    VGGForImageClassification,
    WideResNetForImageClassification,
)

NUM_LABELS = 7


@dataclass(frozen=True)
class VisionCase:
    """A model class, sizes for its configuration that are coprime where they can be, and the size of its images."""

    model_class: type[PreTrainedModel]
    sizes: Mapping[str, Any]
    image_size: int = 9
    num_channels: int = 3

    def build(self, **fields: Any) -> PreTrainedModel:
        """A model in evaluation mode none of whose parameters and statistics is what it starts as."""
        torch.manual_seed(0)
        given = {"num_channels": self.num_channels, "num_labels": NUM_LABELS, **self.sizes, **fields}
        model = self.model_class(self.model_class.config_class(**given)).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.constant_(module.num_batches_tracked, 3)
        return model

    def batch(self, count: int = 5) -> dict[str, Tensor]:
        """Images and their labels."""
        torch.manual_seed(1)
        pixels = torch.randn(count, self.num_channels, self.image_size, self.image_size)
        return {"pixel_values": pixels, "labels": torch.randint(NUM_LABELS, (count,))}


OURS = {
    "resnet-pad": VisionCase(CifarResNetForImageClassification, {"depth": 8, "width": 5, "image_size": 9}),
    "resnet-conv": VisionCase(
        CifarResNetForImageClassification, {"depth": 14, "width": 3, "shortcut": "conv"}, num_channels=1
    ),
    "vgg": VisionCase(VGGForImageClassification, {"depth": 11, "width": 3}, image_size=18),
    "wide-resnet": VisionCase(WideResNetForImageClassification, {"depth": 16, "width": 3, "widen_factor": 2}),
    "wide-resnet-1": VisionCase(
        WideResNetForImageClassification, {"depth": 10, "width": 5, "widen_factor": 1}, num_channels=2
    ),
}
STOCK = VisionCase(
    ResNetForImageClassification,
    {"embedding_size": 5, "hidden_sizes": [12, 16], "depths": [2, 1], "layer_type": "bottleneck"},
    image_size=33,
)
CASES = {**OURS, "stock-bottleneck": STOCK}

each_family = pytest.mark.parametrize("case", OURS.values(), ids=OURS)
each_classifier = pytest.mark.parametrize("case", CASES.values(), ids=CASES)

Weights = Mapping[str, Tensor]


def normalized(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Normalization by running statistics."""
    mean, variance, scale, shift = (
        weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def convolved(x: Tensor, weights: Weights, name: str, stride: int = 1) -> Tensor:
    kernel = weights[f"{name}.weight"]
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def reference_resnet(x: Tensor, weights: Weights, count: int) -> Tensor:
    """He et al. 2016: ``count`` blocks in each of three stages; returns what is averaged."""
    x = normalized(convolved(x, weights, "stem.0"), weights, "stem.1").relu()
    for stage in range(3):
        for block in range(count):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            out = normalized(convolved(x, weights, f"{name}.conv1", stride), weights, f"{name}.norm1").relu()
            out = normalized(convolved(out, weights, f"{name}.conv2"), weights, f"{name}.norm2")
            if f"{name}.shortcut.0.weight" in weights:
                x = normalized(convolved(x, weights, f"{name}.shortcut.0", stride), weights, f"{name}.shortcut.1")
            elif stride == 2:
                kept, missing = x[:, :, ::2, ::2], out.shape[1] - x.shape[1]
                zeros = kept.new_zeros(len(kept), missing, *kept.shape[2:])
                x = torch.cat([zeros[:, : missing // 2], kept, zeros[:, missing // 2 :]], dim=1)
            x = (out + x).relu()
    return x


def reference_wide_resnet(x: Tensor, weights: Weights, count: int) -> Tensor:
    """Zagoruyko & Komodakis 2016: ``count`` blocks in each of three stages; returns what is averaged."""
    x = convolved(x, weights, "stem")
    for stage in range(3):
        for block in range(count):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            active = normalized(x, weights, f"{name}.norm1").relu()
            out = normalized(convolved(active, weights, f"{name}.conv1", stride), weights, f"{name}.norm2").relu()
            out = convolved(out, weights, f"{name}.conv2")
            widens = f"{name}.shortcut.weight" in weights
            x = out + (convolved(active, weights, f"{name}.shortcut", stride) if widens else x)
    return normalized(x, weights, "norm").relu()


def reference_vgg(x: Tensor, weights: Weights, counts: tuple[int, ...]) -> Tensor:
    """Simonyan & Zisserman 2015 with normalization: convolutions by stage; returns what is averaged."""
    for stage, count in enumerate(counts):
        prefix = f"stages.{stage - 1}" if stage else "stem"
        x = F.max_pool2d(x, 2) if stage else x
        for number in range(count):
            place = 3 * number + bool(stage)
            x = normalized(convolved(x, weights, f"{prefix}.{place}"), weights, f"{prefix}.{place + 1}").relu()
    return x
