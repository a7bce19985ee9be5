"""Preparation of images for a network, on the device that they are on: crops, mirrors, normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CROP_AREAS = (0.08, 1.0)  # Szegedy et al. 2015, "Going deeper with convolutions", Sec. 6
CROP_RATIOS = (3 / 4, 4 / 3)


class BatchTransform(nn.Module):
    r"""Module that turns 8-bit images into what a network takes, on the device that they are on.

    In training each image is cropped at random out of a black margin, as large as it was before, and half of them are
    mirrored, as He et al. 2016, Sec. 4.2 do for CIFAR. Then :math:`(x / 255 - \mathrm{mean}) / \mathrm{std}`. Random
    numbers are those of the device, which checkpoints of a Trainer hold.

    Args:
        mean: Of each channel, of values from 0 to 1.
        std: The same.
        crop_padding: Width of the margin, in pixels. 0: no random crop.
        horizontal_flip: Whether to mirror.
        channels_last: Whether the result lies in memory with its channels last.

    Raises:
        ValueError: If a channel is the same in all pixels or ``crop_padding`` is negative.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_padding: int = 4,
        horizontal_flip: bool = True,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if min(std) <= 0:
            raise ValueError(f"the standard deviation of each channel must be positive, got {list(std)}")
        if crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0 pixels, got {crop_padding}")
        self.crop_padding, self.horizontal_flip = crop_padding, horizontal_flip
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        deviations, means = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviations))
        self.register_buffer("shift", -means / deviations)

    def forward(self, images: Tensor, *, training: bool) -> Tensor:
        """Map 8-bit images to float32 of the same shape ``(batch, channels, height, width)``.

        Raises:
            TypeError: If the images are not of 8 bits.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"8-bit images are needed, got {images.dtype}")
        if training:
            images = self._augment(images)
        return images.to(torch.float32, memory_format=self.memory_format).mul_(self.scale).add_(self.shift)

    def _augment(self, images: Tensor) -> Tensor:
        """Crop and mirror by looking all pixels up at once."""
        batch, channels, height, width = images.shape
        margin = self.crop_padding
        top, left, mirrored = (
            torch.randint(count, (batch, 1), device=images.device)
            for count in (2 * margin + 1, 2 * margin + 1, 1 + self.horizontal_flip)
        )
        column = torch.arange(width, device=images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.where(mirrored.bool(), width - 1 - column, column)
        places = rows[:, :, None] * (width + 2 * margin) + columns[:, None, :]
        padded = F.pad(images, (margin, margin, margin, margin))
        return padded.flatten(2).gather(2, places.view(batch, 1, -1).expand(-1, channels, -1)).view_as(images)


def random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a rectangle inside an image, of random area and ratio of its sides (Szegedy et al. 2015, Sec. 6).

    Of ten that are drawn, with areas of 8 to 100 % and ratios between 3:4 and 4:3 (uniform in the logarithm), the first
    that fits is put at a random place. If none does, it is the largest with such a ratio in the center. Returned are
    left, top, right and bottom, in pixels as ``width`` and ``height`` of the image.
    """
    for area, log_ratio, across, down in rng.random((10, 4)).tolist():
        pixels = width * height * (CROP_AREAS[0] + area * (CROP_AREAS[1] - CROP_AREAS[0]))
        ratio = CROP_RATIOS[0] * (CROP_RATIOS[1] / CROP_RATIOS[0]) ** log_ratio
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * CROP_RATIOS[1])), min(height, round(width / CROP_RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
