"""The wide residual networks of Zagoruyko & Komodakis 2016."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

import functools
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from hf_fnl.vision.models.base import (
    ImageClassifier,
    VisionBackbone,
    VisionConfig,
    VisionPreTrainedModel,
    blocks_per_stage,
    check_sizes,
    convolution,
    register,
    residual_stages,
)


@strict
class WideResNetConfig(VisionConfig):
    """Configuration of a wide residual network, "WRN-``depth``-``widen_factor``".

    Channels are ``width`` in the first convolution and ``widen_factor`` times ``width``, ``2 width`` and ``4 width`` in
    three stages of ``(depth - 4) / 6`` blocks each. The other fields are those of
    :class:`~hf_fnl.vision.models.base.VisionConfig`.

    Args:
        depth: Layers, ``6 n + 4``.
        widen_factor: How much wider the stages are than those of a residual network for small images.
        dropout: Rate between the two convolutions of a block.

    Raises:
        ValueError: If the depth or the rate is not allowed, or a size is too small.
    """

    model_type = "fnl_wide_resnet"

    depth: int = 28
    widen_factor: int = 10
    dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        blocks_per_stage(self.depth, 4)
        check_sizes(widen_factor=self.widen_factor)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def hidden_size(self) -> int:
        """Return the channels of the last stage."""
        return 4 * self.widen_factor * self.width


class PreActivationBlock(nn.Module):
    """Two convolutions of 3 by 3 pixels, each after normalization and rectifier, and a shortcut around them.

    Where the channels change, the shortcut is a 1-by-1 convolution of the rectified input.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution.
        dropout: Rate between the convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = convolution(in_channels, out_channels, stride=stride)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(out_channels, out_channels)
        self.shortcut = None if in_channels == out_channels else convolution(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in_channels, height, width)`` to ``(batch, out_channels, ...)``."""
        rectified = F.relu(self.norm1(x))
        out = F.relu(self.norm2(self.conv1(rectified)))
        out = self.conv2(self.dropout(out))
        return out + (x if self.shortcut is None else self.shortcut(rectified))


class WideResNetPreTrainedModel(VisionPreTrainedModel):
    """Base class of the backbone and the classifier."""

    config: WideResNetConfig
    config_class = WideResNetConfig
    _no_split_modules = ("PreActivationBlock",)

    def _draw_weight(self, module: nn.Conv2d | nn.Linear) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))  # as torch.nn.Linear
        else:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class WideResNetModel(WideResNetPreTrainedModel, VisionBackbone):
    """A wide residual network up to its average."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__(config)
        widths = [config.width, *(factor * config.widen_factor * config.width for factor in (1, 2, 4))]
        block = functools.partial(PreActivationBlock, dropout=config.dropout)
        self.stem = convolution(config.num_channels, config.width)
        self.stages = residual_stages(block, widths, blocks_per_stage(config.depth, 4))
        self.norm = nn.BatchNorm2d(config.hidden_size)
        self.post_init()

    def normalized(self, hidden_state: Tensor) -> Tensor:
        """Return the output of the last stage, normalized and rectified."""
        return F.relu(self.norm(hidden_state))


class WideResNetForImageClassification(WideResNetPreTrainedModel, ImageClassifier):
    """A wide residual network with its classifier."""

    backbone_class = WideResNetModel


register(WideResNetModel, WideResNetForImageClassification)
