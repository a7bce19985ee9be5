"""The residual networks for small images of He et al. 2016, Sec. 4.2."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

import functools
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F

from hf_fnl.vision.models.base import (
    ImageClassifier,
    VisionBackbone,
    VisionConfig,
    VisionPreTrainedModel,
    blocks_per_stage,
    convolution,
    register,
    residual_stages,
)

SHORTCUTS = ("pad", "conv")


@strict
class CifarResNetConfig(VisionConfig):
    """Configuration of a residual network for small images.

    Channels are ``width``, ``2 width`` and ``4 width`` in three stages of ``(depth - 2) / 6`` blocks each. The other
    fields are those of :class:`~hf_fnl.vision.models.base.VisionConfig`.

    Args:
        depth: Layers, ``6 n + 2``: 20, 32, 44, 56 or 110 in the paper.
        shortcut: How a shortcut widens where a stage begins: ``"pad"`` takes every other pixel and adds channels of
            zeros (option A of the paper), ``"conv"`` is a 1-by-1 convolution and a normalization (option B).

    Raises:
        ValueError: If the depth or the shortcut is not allowed, or a size is too small.
    """

    model_type = "fnl_cifar_resnet"

    depth: int = 20
    shortcut: str = "pad"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        blocks_per_stage(self.depth, 2)
        if self.shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {self.shortcut!r}")

    @property
    def hidden_size(self) -> int:
        """Return the channels of the last stage."""
        return 4 * self.width


class PadShortcut(nn.Module):
    """Shortcut that takes every ``stride``-th pixel and adds channels of zeros before and after those that are there.

    Args:
        missing: Number of channels to add.
        stride: Distance of the pixels that are kept.
    """

    def __init__(self, missing: int, stride: int) -> None:
        super().__init__()
        self.missing, self.stride = missing, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, channels, height, width)`` to ``(batch, channels + missing, ...)``."""
        before = self.missing // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.missing - before))


class BasicBlock(nn.Module):
    """Two convolutions of 3 by 3 pixels and a shortcut around them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution.
        shortcut: What the shortcut is where input and output differ, ``"pad"`` or ``"conv"``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, shortcut: str) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, stride=stride)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = convolution(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_channels, height, width)`` to ``(batch, out_channels, ...)``."""
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def _shortcut(in_channels: int, out_channels: int, stride: int, kind: str) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(out_channels - in_channels, stride)
    return nn.Sequential(convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class CifarResNetPreTrainedModel(VisionPreTrainedModel):
    """Base class of the backbone and the classifier."""

    config: CifarResNetConfig
    config_class = CifarResNetConfig
    _no_split_modules = ("BasicBlock",)


class CifarResNetModel(CifarResNetPreTrainedModel, VisionBackbone):
    """A residual network for small images, up to its average."""

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        width, count = config.width, blocks_per_stage(config.depth, 2)
        block = functools.partial(BasicBlock, shortcut=config.shortcut)
        self.stem = nn.Sequential(convolution(config.num_channels, width), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = residual_stages(block, (width, width, 2 * width, 4 * width), count)
        self.post_init()


class CifarResNetForImageClassification(CifarResNetPreTrainedModel, ImageClassifier):
    """A residual network for small images with its classifier."""

    backbone_class = CifarResNetModel


register(CifarResNetModel, CifarResNetForImageClassification)
