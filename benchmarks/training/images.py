"""Labeled images on a device as 8-bit numbers, and random crops of them in one read."""

from __future__ import annotations

import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CROP_PADDING = {"cifar10": 4, "digits": 1}
FLIPPED = {"cifar10": True, "digits": False}
SPLITS = ("train", "test")

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


@functools.lru_cache
def read_images(name: str, data: Path, split: str, limit: int | None = None) -> Arrays:
    """Read images ``(count, height, width, channels)`` and their classes ``(count,)``.

    Decoded CIFAR-10 is kept in ``~/.cache/hf_fnl``, where that can be written.

    Args:
        name: ``"cifar10"``, of which ``data`` holds ``cifar10/train.parquet`` and ``cifar10/test.parquet`` with the
            columns ``img`` and ``label``; or ``"digits"``, scikit-learn's.
        data: Folder of the data sets.
        split: ``"train"`` or ``"test"``.
        limit: Only the first of them.

    Raises:
        FileNotFoundError: If the file is not there.
    """
    pixels, labels = _digits(split) if name == "digits" else _cifar10(data / "cifar10" / f"{split}.parquet", limit)
    return pixels[:limit], labels[:limit]


def _digits(split: str) -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    held_out = np.arange(len(digits.target)) % 6 == 0
    rows = held_out if split == "test" else ~held_out
    return (digits.images[rows, :, :, None] * (255 / 16)).round().astype(np.uint8), digits.target[rows]


def _cifar10(path: Path, limit: int | None) -> Arrays:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: --data names the folder that holds cifar10/{path.name}")
    kept = Path.home() / ".cache" / "hf_fnl" / f"cifar10-{path.stat().st_size}.npz"
    if limit is None and kept.exists():
        with np.load(kept) as found:
            return found["pixels"], found["labels"]
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(path, columns=["img", "label"])
    table = table.slice(0, limit) if limit is not None else table

    def decode(cell: dict[str, Any]) -> NDArray[np.uint8]:
        return np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(decode, table["img"].to_pylist())))
    labels = table["label"].to_numpy().astype(np.int64)
    if limit is None:
        _keep(kept, pixels, labels)
    return pixels, labels


def _keep(path: Path, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Write decoded images for later runs; several processes may do so at once."""
    partial = path.with_name(f"{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, pixels=pixels, labels=labels)
        partial.replace(path)
    except OSError:  # no such place here: every run decodes for itself
        partial.unlink(missing_ok=True)


class Batches:
    """Random crops of all training images, each once an epoch, in an order that only the seed and the epoch decide.

    Nothing is drawn while a batch is taken, so that taking can be captured as a CUDA graph.

    Args:
        pixels: ``(count, height, width, channels)``.
        labels: ``(count,)``.
        batch_size: Images of a batch; those that do not fill one are left out for an epoch.
        crop_padding: Black pixels around an image, within which its crop is drawn.
        flipped: Whether half of the crops are mirrored.
        seed: Of all epochs.
        device: Where the images lie.

    Attributes:
        position: Number of the next batch of the epoch, ``(1,)``.
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64],
        *,
        batch_size: int,
        crop_padding: int,
        flipped: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        count, height, width, _ = pixels.shape
        if not 1 <= batch_size <= count:
            raise ValueError(f"--batch-size must be in [1, {count}], the number of images, got {batch_size}")
        self.steps, self.batch_size, self.seed = count // batch_size, batch_size, seed
        self.crop_padding, self.flipped = crop_padding, flipped
        on_device = torch.from_numpy(pixels).to(device)
        self.statistics = channel_statistics(on_device)
        pads = (0, 0, crop_padding, crop_padding, crop_padding, crop_padding)
        self.pixels = torch.nn.functional.pad(on_device, pads)
        self.labels = torch.from_numpy(labels).to(device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self._heights, self._widths = (torch.arange(size, device=device) for size in (height, width))
        self._mirrored = self._widths.flip(0)
        self._draws = torch.zeros(self.steps, 4, batch_size, dtype=torch.int64, device=device)

    def begin_epoch(self, epoch: int) -> None:
        """Draw the order, crops and mirrorings of an epoch, and begin with its first batch."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        count, used = len(self.pixels), self.steps * self.batch_size
        shifts = torch.randint(0, 2 * self.crop_padding + 1, (2, used), generator=generator)
        flips = torch.randint(0, 2, (1, used), generator=generator) * int(self.flipped)
        order = torch.randperm(count, generator=generator)[None, :used]
        draws = torch.cat([order, shifts, flips]).unflatten(1, (self.steps, self.batch_size))
        self._draws.copy_(draws.transpose(0, 1))
        self.position.zero_()

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the next batch: images ``(batch, channels, height, width)``, channels last, and their classes."""
        rows, down, right, flips = self._draws.index_select(0, self.position)[0]
        self.position.add_(1)
        below = (down[:, None] + self._heights)[:, :, None]
        across = (torch.where(flips[:, None] > 0, self._mirrored, self._widths) + right[:, None])[:, None, :]
        crops = self.pixels[rows[:, None, None], below, across]
        return normalize(crops, self.statistics), self.labels[rows]


def channel_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every channel of 8-bit images ``(count, height, width, channels)``."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels.unbind(-1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64, device=pixels.device)
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).sqrt()
    return mean.float(), std.float()


def normalize(pixels: Tensor, statistics: tuple[Tensor, Tensor]) -> Tensor:
    """Return 8-bit images ``(batch, height, width, channels)`` as ``(batch, channels, height, width)``, normalized."""
    mean, std = statistics
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)
