"""Batches of 8-bit images, and what becomes of them on the device: random crops, mirroring and normalization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import IMAGE_PROCESSOR_NAME

from hf_fnl.utils.files import write_json
from hf_fnl.vision.images import BILINEAR, ImageRecords, resize_and_crop, to_array

if TYPE_CHECKING:
    from PIL import Image

KEEP = ("auto", "true", "false")
SHARE_OF_MEMORY = 0.25  # what images may take of the free memory of a device; training needs the rest
CROP_AREAS = (0.08, 1.0)  # Szegedy et al. 2015, "Going deeper with convolutions", Sec. 6
CROP_RATIOS = (3 / 4, 4 / 3)
CROP_TRIES = 10
RESIZED_TO_CROPPED = 256 / 224  # Krizhevsky et al. 2012, Sec. 2 and 4.1


class ImageTensors(Dataset):
    """Images in memory, of which a data loader takes a batch in one go.

    Args:
        pixel_values: 8-bit, ``(num_images, num_channels, height, width)``.
        labels: Class numbers, ``(num_images,)``.
        class_names: Name of each class.
    """

    def __init__(self, pixel_values: Tensor, labels: Tensor, *, class_names: Sequence[str]) -> None:
        self.pixel_values = pixel_values
        self.labels = labels
        self.class_names = list(class_names)

    @classmethod
    def decode(
        cls, records: ImageRecords, *, image_size: int | None = None, like: ImageTensors | None = None
    ) -> ImageTensors:
        """Decode images, all RGB if one of them is, else gray.

        Args:
            records: The images.
            image_size: Resize the shorter side to it and cut out the square in the center. Default: leave them as they
                are, all of one size.
            like: The training images, whose size and channels these must have; color is converted.

        Raises:
            ValueError: If an image cannot be decoded, sizes differ without ``image_size``, or it is below 1.
        """
        _check_size(image_size)
        num_channels = None if like is None else like.num_channels
        arrays = [to_array(_resized(image, image_size), num_channels=num_channels) for image in records]
        size, whose = (arrays[0].shape[1:], records.name(0)) if like is None else (like.image_size, "a training image")
        for index, array in enumerate(arrays):
            if array.shape[1:] != size:
                raise ValueError(
                    f"images must be of one size, but {whose} has {_by(size)} pixels (height x width) and "
                    f"{records.name(index)} has {_by(array.shape[1:])}; set image_size to bring all to one"
                )
        pixels = np.empty((len(arrays), max(map(len, arrays)), *size), np.uint8)
        for index, array in enumerate(arrays):
            pixels[index] = array  # gray is repeated where there are three channels
        return cls(torch.from_numpy(pixels), records.labels, class_names=records.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """A list of one whole batch, for :func:`single_batch`."""
        rows = torch.tensor(indices, device=self.labels.device)
        return [{"pixel_values": self.pixel_values.index_select(0, rows), "labels": self.labels.index_select(0, rows)}]

    @property
    def num_channels(self) -> int:
        """1 for gray, 3 for RGB."""
        return self.pixel_values.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return self.pixel_values.shape[2], self.pixel_values.shape[3]

    @property
    def resized_side(self) -> int:
        """Length to which the shorter side of a new image is resized, in pixels."""
        return min(self.image_size)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels, of values from 0 to 1."""
        channels = self.pixel_values.transpose(0, 1).flatten(1)
        counts = torch.stack([channel.bincount(minlength=256) for channel in channels]).double().cpu()
        values = torch.arange(256, dtype=torch.float64) / 255
        shares = counts / counts.sum(-1, keepdim=True)
        mean = shares @ values
        variance = (shares * (values - mean[:, None]) ** 2).sum(-1)
        return mean.tolist(), variance.sqrt().tolist()

    def to(self, device: torch.device | str) -> ImageTensors:
        """The same images on a device."""
        return ImageTensors(self.pixel_values.to(device), self.labels.to(device), class_names=self.class_names)


class ImageFiles(Dataset):
    """Images that are decoded whenever they are asked for, as RGB: for sets that do not fit in memory.

    Args:
        records: The images.
        image_size: Side of the square, in pixels.
        training: Whether to cut out a rectangle at random, of 8 to 100 % of the area and between 3:4 and 4:3, and to
            resize it (Szegedy et al. 2015); else the shorter side is resized to 256/224 of ``image_size`` and the
            center is cut out. Random numbers come from torch's generator of the process, a data loader's worker or not.

    Raises:
        ValueError: If ``image_size`` is below 1.
    """

    num_channels = 3

    def __init__(self, records: ImageRecords, *, image_size: int, training: bool) -> None:
        _check_size(image_size)
        self.records = records
        self.class_names = records.class_names
        self.image_size = (image_size, image_size)
        self.resized_side = round(image_size * RESIZED_TO_CROPPED)
        self.training = training

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.records[index]
        if self.training:
            image = image.resize(self.image_size, BILINEAR, box=random_box(*image.size))
        else:
            image = resize_and_crop(image, shorter_side=self.resized_side, size=self.image_size[0])
        pixels = torch.from_numpy(to_array(image, num_channels=self.num_channels).copy())
        return {"pixel_values": pixels, "labels": self.records.labels[index]}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """A list of one whole batch, for :func:`single_batch`."""
        records = [self[index] for index in indices]
        return [{name: torch.stack([record[name] for record in records]) for name in records[0]}]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel of ImageNet, of values from 0 to 1."""
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


def keep_on_device(images: ImageTensors, device: torch.device, *, keep: str = "auto") -> ImageTensors:
    """Move images to a device, from which batches are then taken without a transfer.

    A data loader must neither pin the memory of such batches nor have workers.

    Args:
        images: In memory.
        device: Where the model is trained.
        keep: "true", "false", or "auto": on a GPU of CUDA of whose free memory they take up to a quarter.

    Raises:
        ValueError: If ``keep`` is none of the three.
    """
    if keep not in KEEP:
        raise ValueError(f"keep_on_device must be one of {', '.join(KEEP)}, got {keep!r}")
    if keep == "auto" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        keep = "true" if images.pixel_values.nbytes <= SHARE_OF_MEMORY * free else "false"
    return images.to(device) if keep == "true" else images


def single_batch(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collate what is one batch already; a Trainer calls it as ``data_collator``."""
    (batch,) = batches
    return batch


class BatchTransform(nn.Module):
    r"""Turn a batch of 8-bit images into what a network takes, on the device that they are on.

    In training each image is cropped at random out of a black margin, as large as it was before, and half of them are
    mirrored, as He et al. 2016, Sec. 4.2 do for CIFAR. Then :math:`(x / 255 - \mathrm{mean}) / \mathrm{std}`. Random
    numbers are those of the device, which checkpoints of a Trainer hold.

    Args:
        mean: Of each channel, of values from 0 to 1.
        std: The same.
        crop_padding: Width of the margin, in pixels. 0: no random crop.
        horizontal_flip: Whether to mirror.
        channels_last: Whether the result lies in memory with its channels last.
        generator: Source of random numbers. Default: that of the device.

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
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(std) <= 0:
            raise ValueError(f"the standard deviation of each channel must be positive, got {list(std)}")
        if crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0 pixels, got {crop_padding}")
        self.crop_padding = crop_padding
        self.horizontal_flip = horizontal_flip
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.generator = generator
        deviations, means = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
        self.register_buffer("scale", 1 / (255 * deviations))
        self.register_buffer("shift", -means / deviations)

    def forward(self, images: Tensor, *, training: bool) -> Tensor:
        """Augment if ``training``, and normalize.

        Args:
            images: 8-bit, ``(batch, channels, height, width)``.
            training: Whether to crop and to mirror at random.

        Returns:
            The same shape, float32.
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
            torch.randint(count, (batch, 1), device=images.device, generator=self.generator)
            for count in (2 * margin + 1, 2 * margin + 1, 1 + self.horizontal_flip)
        )
        column = torch.arange(width, device=images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.where(mirrored.bool(), width - 1 - column, column)
        places = rows[:, :, None] * (width + 2 * margin) + columns[:, None, :]
        padded = F.pad(images, (margin, margin, margin, margin))
        return padded.flatten(2).gather(2, places.view(batch, 1, -1).expand(-1, channels, -1)).view_as(images)


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """A rectangle inside an image, of random area and ratio of its sides (Szegedy et al. 2015, Sec. 6).

    Of ten that are drawn, with areas of 8 to 100 % and ratios between 3:4 and 4:3 (uniform in the logarithm), the first
    that fits is put at a random place. If none does, it is the largest with such a ratio in the center.

    Args:
        width: Of the image, in pixels.
        height: The same.

    Returns:
        Left, top, right and bottom, in pixels.
    """
    draws = torch.rand(CROP_TRIES, 4, dtype=torch.float64).tolist()
    for area, log_ratio, across, down in draws:
        pixels = width * height * (CROP_AREAS[0] + area * (CROP_AREAS[1] - CROP_AREAS[0]))
        ratio = CROP_RATIOS[0] * (CROP_RATIOS[1] / CROP_RATIOS[0]) ** log_ratio
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * CROP_RATIOS[1])), min(height, round(width / CROP_RATIOS[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def write_image_processor(folder: str | Path, images: ImageTensors | ImageFiles) -> None:
    """Write ``preprocessor_config.json``, so that Transformers prepares images as an evaluation does.

    ``AutoImageProcessor`` and the pipeline ``image-classification`` read it. That pipeline turns whatever it opens into
    RGB; for a network of gray images give it arrays of shape ``(1, height, width)``.

    Args:
        folder: Of the model.
        images: The training images.
    """
    mean, std = images.statistics()
    height, width = images.image_size
    exact = {"height": height, "width": width}
    settings = {
        "image_processor_type": "BitImageProcessor",  # needs no torchvision
        "do_convert_rgb": images.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": images.resized_side} if height == width else exact,
        "resample": BILINEAR,
        "do_center_crop": True,
        "crop_size": exact,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }
    write_json(Path(folder) / IMAGE_PROCESSOR_NAME, settings)


def _resized(image: Image.Image, size: int | None) -> Image.Image:
    return image if size is None else resize_and_crop(image, shorter_side=size, size=size)


def _check_size(image_size: int | None) -> None:
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel or None to leave images as they are, got {image_size}")


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
