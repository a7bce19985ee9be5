"""VGG with batch normalization and no fully connected layer but the classifier (the VGG19-NFC of Wang et al. 2020)."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from itertools import pairwise
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from hf_fnl.vision.models.base import (
    ImageClassifier,
    VisionBackbone,
    VisionConfig,
    VisionPreTrainedModel,
    convolution,
    register,
)

# Simonyan & Zisserman 2015, Table 1, by depth: convolutions in each of the five stages.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


@strict
class VGGConfig(VisionConfig):
    """Configuration of a VGG.

    Channels are ``width`` times 1, 2, 4, 8 and 8 in five stages with a maximum over 2 by 2 pixels between them. The
    other fields are those of :class:`~hf_fnl.vision.models.base.VisionConfig`.

    Args:
        depth: 11, 13, 16 or 19: the convolutions and the three fully connected layers of the original, of which one is
            left here.

    Raises:
        ValueError: If the depth is not allowed, or a size is too small: images have at least 16 pixels a side.
    """

    model_type = "fnl_vgg"
    smallest_image: ClassVar[int] = 16

    depth: int = 19
    width: int = 64

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.depth not in CONVOLUTIONS:
            raise ValueError(f"depth must be one of {', '.join(map(str, CONVOLUTIONS))}, got {self.depth}")

    @property
    def hidden_size(self) -> int:
        """Return the channels of the last stage."""
        return 8 * self.width


class VGGPreTrainedModel(VisionPreTrainedModel):
    """Base class of the backbone and the classifier."""

    config: VGGConfig
    config_class = VGGConfig

    def _draw_weight(self, module: nn.Conv2d | nn.Linear) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.01)  # as the code of Wang et al. 2019
        else:
            super()._draw_weight(module)


class VGGModel(VGGPreTrainedModel, VisionBackbone):
    """A VGG up to its average."""

    def __init__(self, config: VGGConfig) -> None:
        super().__init__(config)
        widths = [config.num_channels, *(factor * config.width for factor in (1, 2, 4, 8, 8))]
        sizes = zip(pairwise(widths), CONVOLUTIONS[config.depth], strict=True)
        first, *others = (_convolutions(before, after, count) for (before, after), count in sizes)
        self.stem = nn.Sequential(*first)
        self.stages = nn.Sequential(*(nn.Sequential(nn.MaxPool2d(2), *stage) for stage in others))
        self.post_init()


def _convolutions(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    """Convolutions of 3 by 3 pixels, each normalized and rectified."""
    inputs = [in_channels] + [out_channels] * (count - 1)
    layers = ((convolution(channels, out_channels), nn.BatchNorm2d(out_channels), nn.ReLU()) for channels in inputs)
    return [layer for triple in layers for layer in triple]


class VGGForImageClassification(VGGPreTrainedModel, ImageClassifier):
    """A VGG with its classifier."""

    backbone_class = VGGModel


register(VGGModel, VGGForImageClassification)
