"""Padding cut away: sequences that an attention mask pads run at their own lengths.

What is not there counts nowhere, whatever a model makes of its inputs on the way: flattened, transposed, cut into
windows or routed to experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = Mapping[str, Tensor]

_SIDES = {"encoder_", "decoder_"}


def unpadded(model: nn.Module, batch: Batch) -> Iterator[Batch]:
    """Divide a batch into batches of sequences that masks pad alike, and cut the padding away.

    Masks are ``(sequences, length)`` under names that end in ``attention_mask``. Those of an encoder or decoder beside
    another go with the inputs whose names begin alike. Sequences of which nothing is left are left out.

    Args:
        model: What the batch is for.
        batch: Its inputs, the sequences along their first dimension.

    Raises:
        ValueError: If a mask has another shape or that of no input, hides all positions, or some between others.
    """
    named = {name: mask for name, mask in batch.items() if name.endswith(("attention_mask", "pixel_mask"))}
    # One of no such inputs, as Longformer's global_attention_mask, tells something else.
    inputs = ["", *_SIDES, *(name for name in batch if name not in named)]
    masks = {name: mask for name, mask in named.items() if any(key.startswith(_prefix(name)) for key in inputs)}
    padded = {name: mask for name, mask in masks.items() if not mask.all()}
    if not padded:
        yield batch
        return
    dims = {name: _dims(model, name, batch, masks) for name in padded}
    for name, mask in padded.items():
        if mask.ndim != 2 or not dims[name]:
            listed = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items() if key not in masks)
            raise ValueError(
                f"{name} of shape {tuple(mask.shape)} tells of no input which positions are padding; it goes with "
                f"those of its shape (sequences, length), and there are {listed or 'none'}: pad nothing otherwise"
            )
    yield from _groups(batch, padded, dims)


def _groups(batch: Batch, padded: Batch, dims: Mapping[str, Mapping[str, int]]) -> Iterator[Batch]:
    mask = next(iter(padded.values()))
    rows: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for row in range(len(mask)):
        extents = tuple(_extent(name, each[row]) for name, each in padded.items())
        if all(start < stop for start, stop in extents):
            rows.setdefault(extents, []).append(row)
    if not rows:
        raise ValueError(f"{', '.join(padded)} leaves no position: is every position masked?")
    for extents, chosen in rows.items():
        part = {key: _of_sequences(key, value, len(mask), chosen) for key, value in batch.items()}
        for name, (start, stop) in zip(padded, extents, strict=True):
            for key, dim in dims[name].items():
                part[key] = part[key].narrow(dim, start, stop - start)
        yield part


def _of_sequences(key: str, value: Tensor, count: int, chosen: list[int]) -> Tensor:
    """The part of an input that belongs to some of the sequences; all of it where it belongs to none."""
    dim = _first_dim(key, value)
    if value.shape[dim : dim + 1] == (count,):
        return value.index_select(dim, torch.tensor(chosen, device=value.device))
    if key.startswith("pixel_values") and value.ndim == 2 and len(chosen) < count:  # patches, as of Qwen2-VL
        raise ValueError(
            f"{key} of shape {tuple(value.shape)} does not tell which patches belong to which of {count} sequences "
            "that are padded differently: give each of these in a calibration batch of its own"
        )
    return value


def _first_dim(key: str, value: Tensor) -> int:
    """The dimension of sequences; ``position_ids`` of images have those of time, height and width before it."""
    return value.ndim - 2 if key == "position_ids" else 0


def _dims(model: nn.Module, name: str, batch: Batch, masks: Batch) -> dict[str, int]:
    """Dimension of positions in a mask and in each input that it goes with; nothing if there is no such input."""
    own, mask = _prefix(name), masks[name]
    others = tuple(({_prefix(each) for each in masks} | _SIDES) - {own, ""})
    has_two_sides = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    found = {}
    for key, value in batch.items():
        side = f"decoder_{key}" if has_two_sides and key == "labels" else key
        first = _first_dim(key, value)
        sizes = [mask.shape[:1], (1,)] if key == "position_ids" else [mask.shape[:1]]
        is_of_others = key in masks or not side.startswith(own) or side.startswith(others)
        if is_of_others or value.shape[first : first + 1] not in sizes:
            continue
        # Positions come after the sequences, or after the channels of these.
        places = (dim for dim in (first + 1, first + 2) if value.shape[dim : dim + 1] == mask.shape[1:])
        if (dim := next(places, None)) is not None:
            found[key] = dim
    return {name: 1, **found} if found else {}


def _prefix(name: str) -> str:
    """Return the beginning of the names of the inputs that a mask goes with."""
    return name.removesuffix("attention_mask").removesuffix("mask")


def _extent(name: str, mask: Tensor) -> tuple[int, int]:
    """Return the first position that the mask of a sequence leaves, and the end of them; equal if it hides all."""
    places = mask.nonzero().flatten().tolist()
    if not places:
        return 0, 0
    start, stop = places[0], places[-1] + 1
    if len(places) < stop - start:
        raise ValueError(
            f"{name} hides positions between others; calibration takes padding before and after a sequence: leave "
            "such sequences out, or cut them in two"
        )
    return start, stop
