"""Base classes of the vision models: configuration, backbone and classifier; their blocks and registration."""

# No `from __future__ import annotations`: `strict` checks the fields of a configuration against types, not strings.

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple


@strict
class VisionConfig(PreTrainedConfig):
    """Configuration of a convolutional network that ends in a global average.

    Args:
        width: Channels of the first convolution.
        num_channels: Channels of the images.
        image_size: Height and width of the images in pixels that the model is meant for; it takes others as well.

    Raises:
        ValueError: If a size is too small.
    """

    smallest_image: ClassVar[int] = 1  # pixels of the shorter side that leave something to average

    width: int = 16
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_sizes(width=self.width, num_channels=self.num_channels, num_labels=self.num_labels)
        check_sizes(self.smallest_image, image_size=self.image_size)

    @property
    def hidden_size(self) -> int:
        """Return the channels of the last layer, which the classifier sees."""
        raise NotImplementedError


def check_sizes(smallest: int = 1, **sizes: int | None) -> None:
    """Raise a ``ValueError`` if one of the named sizes is given and too small."""
    for option, size in sizes.items():
        if size is not None and size < smallest:
            raise ValueError(f"{option} must be at least {smallest}, got {size}")


def blocks_per_stage(depth: int, extra: int) -> int:
    """Return the residual blocks in each of three stages, ``n`` where the network has ``6 n + extra`` layers.

    Raises:
        ValueError: If the depth is of another form.
    """
    count = max(1, round((depth - extra) / 6))
    if depth != 6 * count + extra:
        raise ValueError(f"depth must be 6 n + {extra}, got {depth}; the nearest is {6 * count + extra}")
    return count


class VisionPreTrainedModel(PreTrainedModel):
    """Base class of backbones and classifiers, with the initialization of He et al. 2015."""

    config: VisionConfig
    config_class = VisionConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Conv2d | nn.Linear):
            super()._init_weights(module)
            return
        self._draw_weight(module)
        if module.bias is not None:
            init.zeros_(module.bias)

    def _draw_weight(self, module: nn.Conv2d | nn.Linear) -> None:
        init.kaiming_normal_(module.weight, nonlinearity="relu")


class VisionBackbone(VisionPreTrainedModel):
    """A network up to its global average: a ``stem`` of convolutions, then ``stages``."""

    stem: nn.Module
    stages: nn.Sequential

    def normalized(self, hidden_state: Tensor) -> Tensor:
        """Return what is averaged, from the output of the last stage: the same, unless a network normalizes it."""
        return hidden_state

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Compute the features of images.

        Args:
            pixel_values: ``(batch, num_channels, height, width)``.
            output_hidden_states: Whether the output has ``hidden_states``; that of the configuration unless given.

        Returns:
            ``last_hidden_state (batch, hidden_size, rows, columns)``, its average ``pooler_output (batch,
            hidden_size)``, and ``hidden_states``, the outputs of the stem and of each stage, of which the last is
            ``last_hidden_state``.

        Raises:
            ValueError: If the images are too small or have another number of channels.
        """
        self._check_images(pixel_values.shape)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_state = self.stem(pixel_values)
        states = [hidden_state]
        for stage in self.stages:
            hidden_state = stage(hidden_state)
            states = [*states, hidden_state] if output_hidden_states else [hidden_state]
        states[-1] = self.normalized(hidden_state)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=states[-1],
            pooler_output=states[-1].mean((2, 3)),
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _check_images(self, shape: Sequence[int]) -> None:
        channels, smallest = self.config.num_channels, self.config.smallest_image
        if len(shape) != 4 or shape[1] != channels or min(shape[2:]) < smallest:
            raise ValueError(
                f"pixel_values must be (batch, {channels}, height, width) of at least {smallest} pixels a side, "
                f"got {tuple(shape)}; num_channels={channels} is an option of the configuration"
            )


class ImageClassifier(VisionPreTrainedModel):
    """A backbone and a linear layer on its average."""

    backbone_class: ClassVar[type[VisionBackbone]]
    accepts_loss_kwargs = True

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.backbone = self.backbone_class(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values: ``(batch, num_channels, height, width)``.
            labels: Classes, ``(batch,)`` in ``[0, num_labels)``, where -100 leaves an image out of the loss; or
                targets ``(batch, num_labels)`` for the other problem types of Transformers.
            output_hidden_states: Whether the output has ``hidden_states``; that of the configuration unless given.
            num_items_in_batch: Labels in the whole batch, over accumulation steps and processes, as the Trainer passes
                it.

        Returns:
            ``logits (batch, num_labels)``, where there are labels the ``loss`` in float32, and the backbone's
            ``hidden_states``.

        Raises:
            ValueError: If the images are too small or have another number of channels.
        """
        features = self.backbone(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(features.pooler_output)
        loss = None
        if labels is not None:
            options = {"config": self.config, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(labels, logits.float(), **options)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=features.hidden_states)


def convolution(in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias whose output is as large as its input, divided by the stride."""
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def residual_stages(block: Callable[[int, int, int], nn.Module], widths: Sequence[int], count: int) -> nn.Sequential:
    """Return stages of residual blocks; every stage but the first halves height and width in its first block.

    Args:
        block: Makes a block from its input channels, output channels and stride.
        widths: Channels of the input, then of each stage.
        count: Blocks in each stage.
    """
    stages = []
    for number, (before, after) in enumerate(pairwise(widths)):
        first = block(before, after, 1 if number == 0 else 2)
        stages.append(nn.Sequential(first, *(block(after, after, 1) for _ in range(count - 1))))
    return nn.Sequential(*stages)


def register(backbone: type[VisionBackbone], classifier: type[ImageClassifier]) -> None:
    """Register a family with the Auto classes of Transformers."""
    config = backbone.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, backbone, exist_ok=True)
    AutoModelForImageClassification.register(config, classifier, exist_ok=True)
