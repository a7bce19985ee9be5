"""Image data sets in memory or on disk, and their options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import IMAGE_PROCESSOR_NAME

from hf_fnl.training.command_line import check_at_least, named
from hf_fnl.utils.files import write_json
from hf_fnl.vision.images import BILINEAR, ImageRecords, load_images, resize_and_crop, to_array
from hf_fnl.vision.transforms import random_box

SHARE_OF_MEMORY = 0.25  # what images may take of the free memory of a device; training needs the rest
RESIZED_TO_CROPPED = 256 / 224  # Krizhevsky et al. 2012, Sec. 2 and 4.1


@dataclass
class ImageOptions:
    """Options for the images to train and to evaluate on."""

    dataset: str = field(default="digits", metadata={"help": "Hub id, parquet file, folder, or digits."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    eval_dataset: str | None = field(default=None, metadata={"help": "The same to evaluate on. Default: dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images. Default: found."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes. Default: found."})
    max_train_images: int | None = field(default=None, metadata={"help": "Take so many, drawn at random."})
    max_eval_images: int | None = field(default=None, metadata={"help": "Take so many, drawn at random."})
    image_size: int | None = field(default=None, metadata={"help": "Resize and crop to this square, in pixels."})
    resized_crops: bool = field(
        default=False,
        metadata={
            "help": "Decode while training and crop at random sizes (ImageNet), instead of keeping images in memory."
        },
    )
    crop_padding: int | None = field(
        default=None,
        metadata={"help": "Black pixels around an image before it is cropped at random. Default: 4, for digits 1."},
    )
    horizontal_flip: bool | None = field(
        default=None, metadata={"help": "Mirror half of the images, at random. Default: all data sets but digits."}
    )

    def __post_init__(self) -> None:
        if self.eval_dataset is None and Path(self.dataset).expanduser().is_file():
            raise ValueError(f"dataset={self.dataset} is one file, which is one split: set eval_dataset to another")
        if self.resized_crops and self.image_size is None:
            raise ValueError("resized_crops needs image_size, the side of the crops in pixels")
        if self.resized_crops and self.crop_padding:
            raise ValueError("resized_crops and crop_padding are two ways of cropping; set one of them")
        if self.crop_padding is None:
            self.crop_padding = 0 if self.resized_crops else 1 if self.dataset == "digits" else 4
        check_at_least(1, self, "max_train_images", "max_eval_images", "image_size")
        if self.horizontal_flip is None:
            self.horizontal_flip = self.dataset != "digits"

    def load(self, part: str, class_names: Sequence[str] | None = None) -> ImageRecords:
        """Load the images of the part "train" or "eval", the latter with the numbers that classes have in training."""
        own = part == "eval" and self.eval_dataset is not None
        option = "eval_dataset" if own else "dataset"
        with named(option, source := getattr(self, option)):
            return load_images(
                source,
                split=getattr(self, f"{part}_split"),
                name=None if own else self.dataset_config,
                image_column=self.image_column,
                label_column=self.label_column,
                class_names=class_names,
                limit=getattr(self, f"max_{part}_images"),
            )


class ImageData(Dataset):
    """Data set of 8-bit images with labels, of which a data loader takes a batch in one go.

    Attributes:
        class_names: Name of each class.
        num_channels: 1 for gray, 3 for RGB.
        image_size: Height and width, in pixels.
        resized_side: Length to which the shorter side of a new image is resized, in pixels.
    """

    class_names: list[str]
    num_channels: int
    image_size: tuple[int, int]
    resized_side: int

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return a list of one batch, for :func:`single_batch`."""
        rows = [self[index] for index in indices]
        return [{name: torch.stack([row[name] for row in rows]) for name in rows[0]}]

    def __len__(self) -> int:
        raise NotImplementedError

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation of each channel, of values from 0 to 1."""
        raise NotImplementedError


class ImageTensors(ImageData):
    """Images in memory.

    Args:
        pixel_values: 8-bit, ``(num_images, num_channels, height, width)``.
        labels: Class numbers, ``(num_images,)``.
        class_names: Name of each class.
    """

    def __init__(self, pixel_values: Tensor, labels: Tensor, *, class_names: Sequence[str]) -> None:
        self.pixel_values, self.labels, self.class_names = pixel_values, labels, list(class_names)
        _, self.num_channels, *size = pixel_values.shape
        self.image_size, self.resized_side = (size[0], size[1]), min(size)

    @classmethod
    def decode(
        cls, records: ImageRecords, *, image_size: int | None = None, like: ImageTensors | None = None
    ) -> ImageTensors:
        """Decode images, all RGB if one of them is, else gray.

        Args:
            records: The images.
            image_size: Resize the shorter side to it and cut out the square in the center. Default: keep them as they
                are, all of one size.
            like: The training images, whose size and channels these must have; color is converted.

        Raises:
            ValueError: If an image cannot be decoded, or sizes differ without ``image_size``.
        """
        arrays = [
            to_array(
                image if image_size is None else resize_and_crop(image, shorter_side=image_size, size=image_size),
                num_channels=None if like is None else like.num_channels,
            )
            for image in records
        ]
        size, whose = (arrays[0].shape[1:], records.name(0)) if like is None else (like.image_size, "a training image")
        for index, array in enumerate(arrays):
            if array.shape[1:] != size:
                raise ValueError(
                    f"images must be of one height and width, but {whose} has {size} pixels and {records.name(index)} "
                    f"has {array.shape[1:]}; set image_size to bring all to one"
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
        """Return a list of one batch, for :func:`single_batch`."""
        rows = torch.tensor(indices, device=self.labels.device)  # index_select is five times as fast as indexing
        return [{"pixel_values": self.pixel_values.index_select(0, rows), "labels": self.labels.index_select(0, rows)}]

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation of each channel over all pixels, of values from 0 to 1."""
        channels = self.pixel_values.transpose(0, 1).flatten(1)
        shares = torch.stack([channel.bincount(minlength=256) for channel in channels]).double().cpu()
        shares /= shares.sum(-1, keepdim=True)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = shares @ values
        variance = (shares * (values - mean[:, None]) ** 2).sum(-1)
        return mean.tolist(), variance.sqrt().tolist()

    def to(self, device: torch.device | str) -> ImageTensors:
        """Return the same images on a device."""
        return ImageTensors(self.pixel_values.to(device), self.labels.to(device), class_names=self.class_names)


class ImageFiles(ImageData):
    """Images that are decoded whenever they are asked for, as RGB: for sets that do not fit in memory.

    Args:
        records: The images.
        image_size: Side of the square, in pixels.
        training: Whether to cut out a rectangle at random, of 8 to 100 % of the area and between 3:4 and 4:3, and to
            resize it (Szegedy et al. 2015); else the shorter side is resized to 256/224 of ``image_size`` and the
            center is cut out. The rectangle is a function of the seed, the epoch and the image, so that a resumed run
            sees what an uninterrupted one would, with any number of workers.
        seed: Of the rectangles.
    """

    num_channels = 3

    def __init__(self, records: ImageRecords, image_size: int, *, training: bool, seed: int = 0) -> None:
        self.seed, self._epoch = seed, torch.zeros((), dtype=torch.int64).share_memory_()  # workers see it change
        self.records, self.class_names, self.training = records, records.class_names, training
        self.image_size, self.resized_side = (image_size, image_size), round(image_size * RESIZED_TO_CROPPED)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.records[index]
        if self.training:
            rng = np.random.default_rng([self.seed, int(self._epoch), index])
            image = image.resize(self.image_size, BILINEAR, box=random_box(*image.size, rng))
        else:
            image = resize_and_crop(image, shorter_side=self.resized_side, size=self.image_size[0])
        pixels = torch.from_numpy(to_array(image, num_channels=self.num_channels).copy())
        return {"pixel_values": pixels, "labels": self.records.labels[index]}

    def statistics(self) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation of each channel of ImageNet, of values from 0 to 1."""
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)


def load_image_sets(options: ImageOptions, *, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Load the images to train and to evaluate on, of the same classes, channels and size; crops follow the seed."""
    training = options.load("train")
    evaluation, size = options.load("eval", training.class_names), options.image_size
    if options.resized_crops and size is not None:  # the first asks for the second
        return ImageFiles(training, size, training=True, seed=seed), ImageFiles(evaluation, size, training=False)
    images = ImageTensors.decode(training, image_size=size)
    return images, ImageTensors.decode(evaluation, image_size=size, like=images)


def keep_on_device(images: ImageTensors, device: torch.device) -> ImageTensors:
    """Move images to a CUDA GPU of whose free memory they take up to a quarter; else return them as they are.

    Batches are then taken without a transfer. A data loader must neither pin their memory nor have workers.
    """
    if device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.pixel_values.nbytes <= SHARE_OF_MEMORY * free else images


def single_batch(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the one batch of a list, a collator for data sets whose ``__getitems__`` makes such lists."""
    (batch,) = batches
    return batch


def write_image_processor(folder: str | Path, images: ImageData) -> None:
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
