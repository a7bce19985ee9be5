"""Labeled images from the Hub, parquet files, folders or scikit-learn; decoded and resized one by one by Pillow."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_fnl.tasks.documents import looks_like_path, read_files
from hf_fnl.utils.extras import require
from hf_fnl.utils.hub import check_source

if TYPE_CHECKING:
    from PIL import Image

SHUFFLE_SEED = 0
DIGITS_HELD_OUT = 297  # of 1797, so that 1500 remain
BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
_GRAY_MODES = {"1", "L", "LA"}
_DEEP_MODES = {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}  # Pillow cuts them off at 255 instead of scaling them
_EXTRA = "hf_fnl[vision]"


@dataclass(frozen=True)
class ImageRecords:
    """Images as they are stored, decoded when they are asked for, and the numbers of their classes.

    Args:
        images: The column ``image``, with the ``path`` and the ``bytes`` of each.
        labels: Shape ``(len(images),)``, integers from 0.
        class_names: Name of each class.
        source: What to name in errors.
    """

    images: datasets.Dataset
    labels: Tensor
    class_names: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Image.Image]:
        cells = (cell for batch in self.images.iter(1024) for cell in batch["image"])  # faster than one by one
        return (self._decode(cell, index) for index, cell in enumerate(cells))

    def __getitem__(self, index: int) -> Image.Image:
        return self._decode(self.images[index]["image"], index)

    def name(self, index: int) -> str:
        """Return what to call an image in errors."""
        return f"record {index} of {self.source}"

    def _decode(self, cell: dict[str, Any], index: int) -> Image.Image:
        """Return an image upright, a gray one in mode L and any other in RGB."""
        images, operations = pillow("Image"), pillow("ImageOps")
        try:
            with images.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as image:
                if image.mode in _DEEP_MODES:
                    raise ValueError(f"its mode is {image.mode}, but pixels must have 8 bits a channel")
                upright = operations.exif_transpose(image)
                return upright.convert("L" if upright.mode in _GRAY_MODES else "RGB")
        except Exception as error:
            path = (cell and cell["path"]) or "not a file of its own"
            raise ValueError(f"cannot decode the image in {self.name(index)} ({path}): {error}") from error


def load_images(
    source: str | Path,
    *,
    split: str = "train",
    name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
) -> ImageRecords:
    """Load labeled images, none of which is decoded yet.

    Args:
        source: A data set id on the Hub; a parquet file; a folder of parquet files or of images, one folder a class; or
            ``"digits"`` for scikit-learn's.
        split: Split to load. In a folder it is the files or folders with ``train``, ``test`` or a word like these in
            their names; where none has, all are the train split. A single file is whatever split is asked for.
        name: Configuration of a Hub data set that has several.
        image_column: Column of the images. Default: the one column of images.
        label_column: Column of the classes. Default: the one column of classes, or else of integers.
        class_names: Classes of the training images, whose numbers those of this data set are exchanged for: by name, or
            as they are where the data set does not name its classes. Default: these are the training images.
        limit: Take this many images at most, drawn at random with the seed 0, so that sorted data sets keep all their
            classes; in the order that they stand in. A lower limit takes a part of what a higher one takes.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If the data cannot be read or are empty, a column is absent or ambiguous, a label is no number of a
            class, there is one class only, or one without a training image, ``class_names`` lacks a class, or ``limit``
            is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image or None for all, got {limit}")
    records = _load(source, split, name)
    image_column = image_column or _find_column(
        records, "image", source, [lambda feature: isinstance(feature, datasets.Image)]
    )
    label_column = label_column or _find_column(records, "label", source, [_is_class, _is_integer])
    for option, column in {"image_column": image_column, "label_column": label_column}.items():
        if column not in records.column_names:
            raise ValueError(f"no column {column!r} in {source}; set {option} to one of {records.column_names}")
    labels = _read_labels(records, label_column, source)
    feature = records.features[label_column]
    names = feature.names if _is_class(feature) else None
    if class_names is None:
        class_names = _training_classes(labels, names, source)
    else:
        labels = _training_numbers(labels, names, class_names, source)
    try:
        images = records.select_columns([image_column]).rename_columns({image_column: "image"})
        images = images.cast_column("image", datasets.Image(decode=False))
    except Exception as error:
        feature = records.features[image_column]
        raise ValueError(
            f"column {image_column!r} of {source} holds {feature}, no images; set image_column to one that does"
        ) from error
    if limit is not None:
        rows = np.sort(np.random.default_rng(SHUFFLE_SEED).permutation(len(records))[:limit])
        images, labels = images.select(rows), labels[rows]
    return ImageRecords(images, torch.from_numpy(labels), list(class_names), str(source))


def _load(source: str | Path, split: str, name: str | None) -> datasets.Dataset:
    if source == "digits":
        return embedded_digits(split)
    if isinstance(source, str) and not looks_like_path(source):
        check_source(source, "dataset")
        return datasets.load_dataset(source, name, split=split)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{path} is no parquet file; give one, a folder of them, or a folder with one folder a class")
    return read_files(str(path), None, split) if path.is_dir() else read_files("parquet", [path], split)


@functools.cache
def embedded_digits(split: str) -> datasets.Dataset:
    """Return scikit-learn's 1797 digits: 8x8 gray images, their 17 levels spread over 0 to 255.

    Args:
        split: "train" (1500) or "test" (297), which hold equal shares of each digit.

    Raises:
        ImportError: If scikit-learn is not installed; the message names the extra that holds it.
        ValueError: If ``split`` is neither of the two.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split of the embedded digits must be "train" or "test", got {split!r}')
    purpose = "the digits are those of scikit-learn, that is"
    digits = require("sklearn.datasets", purpose, _EXTRA).load_digits()
    halves = require("sklearn.model_selection", purpose, _EXTRA).train_test_split(
        np.arange(len(digits.target)), test_size=DIGITS_HELD_OUT, stratify=digits.target, random_state=SHUFFLE_SEED
    )
    rows = np.sort(halves[split == "test"])
    pixels = (digits.images[rows] * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(n) for n in range(10)]))
    columns = {"image": [pillow("Image").fromarray(image) for image in pixels], "label": digits.target[rows]}
    return datasets.Dataset.from_dict(columns, features=features)


def pillow(module: str) -> Any:
    """Return a module of Pillow, or raise an ``ImportError`` that says how it is installed."""
    return require(f"PIL.{module}", "images are decoded by Pillow, that is", _EXTRA)


def to_array(image: Image.Image, *, num_channels: int | None = None) -> NDArray[np.uint8]:
    """Return the pixels of an image, gray (mode L) or RGB, as ``(num_channels, height, width)`` of 1 or 3 channels."""
    mode = {None: image.mode, 1: "L", 3: "RGB"}[num_channels]
    pixels = np.asarray(image.convert(mode))
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def resize_and_crop(image: Image.Image, *, shorter_side: int, size: int) -> Image.Image:
    """Resize an image with antialiasing, its sides in proportion, and cut the square of ``size`` out of its center."""
    # Rounded down as Transformers' image processors do.
    width, height = (shorter_side * side // min(image.size) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), BILINEAR).crop((left, top, left + size, top + size))


def _is_class(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel)


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def _find_column(records: datasets.Dataset, kind: str, source: object, tests: Sequence[Callable[[Any], bool]]) -> str:
    """Return the one column that passes the first of the tests that any column passes."""
    found = [[column for column, feature in records.features.items() if test(feature)] for test in tests]
    columns = next(filter(None, found), [])
    if len(columns) != 1:
        count = f"several {kind} columns" if columns else f"no {kind} column"
        raise ValueError(f"{count} in {source}; set {kind}_column to one of {columns or sorted(records.column_names)}")
    return columns[0]


def _read_labels(records: datasets.Dataset, column: str, source: object) -> NDArray[np.int64]:
    feature = records.features[column]
    labels = np.asarray(records.with_format("numpy")[column][:])
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"column {column!r} of {source} holds {feature}, as {labels[0]!r}, but every label must be the number of a "
            "class; set label_column to one that holds these"
        )
    wrong = (labels < 0) | (labels >= (feature.num_classes if _is_class(feature) else np.inf))
    if wrong.any():
        raise ValueError(
            f"label {labels[wrong.argmax()]} in record {wrong.argmax()} of {source} is no number of a class, which "
            "count from 0; splits without labels are filled with -1, set the split to one with labels"
        )
    return labels.astype(np.int64)


def _training_classes(labels: NDArray[np.int64], names: list[str] | None, source: object) -> list[str]:
    """Return the names of all classes, each of which must occur."""
    present = np.unique(labels)
    count = len(names) if names else int(present[-1]) + 1
    if count < 2:  # which Transformers would take for a regression
        raise ValueError(f"images of two classes at least are needed, and those of {source} are of one")
    if len(present) < count:
        first = next((number for number, label in enumerate(present) if number != label), len(present))
        raise ValueError(
            f"{count - len(present)} of {count} classes have no training image in {source}, the first is number "
            f"{first}{f' ({names[first]})' if names else ''}; leave them out and number the classes from 0"
        )
    return names or [str(number) for number in range(count)]


def _training_numbers(
    labels: NDArray[np.int64], names: list[str] | None, class_names: Sequence[str], source: object
) -> NDArray[np.int64]:
    """Return the numbers that the classes of labels have in training."""
    known = {name: number for number, name in enumerate(class_names)}
    numbers = [known.get(name, -1) for name in names] if names else [*range(len(class_names))]
    found = np.array([*numbers, -1])[np.minimum(labels, len(numbers))]
    if (found < 0).any():
        record = found.argmin()
        raise ValueError(
            f"class {names[labels[record]] if names else labels[record]} in record {record} of {source} is not among "
            f"the {len(class_names)} classes of the training images"
        )
    return found
