"""What a script asks for its images, and the two sets of them that it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_fnl.training.command_line import check_at_least, named
from hf_fnl.vision.image_batches import ImageFiles, ImageTensors
from hf_fnl.vision.images import ImageRecords, load_images


@dataclass
class ImageOptions:
    """The images to train and to evaluate on."""

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
        check_at_least(1, self, "max_train_images", "max_eval_images")
        if self.horizontal_flip is None:
            self.horizontal_flip = self.dataset != "digits"

    def training(self) -> ImageRecords:
        """The images to train on."""
        return self._load("dataset", name=self.dataset_config, split=self.train_split, limit=self.max_train_images)

    def evaluation(self, class_names: Sequence[str]) -> ImageRecords:
        """The images to evaluate on, with the numbers that their classes have in training."""
        option, name = ("eval_dataset", None) if self.eval_dataset else ("dataset", self.dataset_config)
        return self._load(option, name=name, split=self.eval_split, limit=self.max_eval_images, class_names=class_names)

    def _load(self, option: str, **how: Any) -> ImageRecords:
        with named(option, source := getattr(self, option)):
            return load_images(source, image_column=self.image_column, label_column=self.label_column, **how)


def load_image_sets(options: ImageOptions) -> tuple[ImageTensors | ImageFiles, ImageTensors | ImageFiles]:
    """The images to train and to evaluate on, of the same classes, channels and size."""
    training = options.training()
    evaluation = options.evaluation(training.class_names)
    size = options.image_size
    if options.resized_crops:
        assert size is not None  # as ImageOptions made sure
        return (
            ImageFiles(training, image_size=size, training=True),
            ImageFiles(evaluation, image_size=size, training=False),
        )
    images = ImageTensors.decode(training, image_size=size)
    return images, ImageTensors.decode(evaluation, image_size=size, like=images)
