"""Padding cut away: sequences that an attention mask pads run at their own lengths.

What is not there counts nowhere, whatever a model makes of its inputs on the way: flattened, transposed, cut into
windows or routed to experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = Mapping[str, Tensor]
# First position that a mask leaves of a sequence, and the end of them; two such pairs of an image.
Extent: TypeAlias = tuple[tuple[int, int], ...]

_SIDES = {"encoder_", "decoder_"}


def unpadded(model: nn.Module, batch: Batch, *, choices_apart: bool = True) -> Iterator[Batch]:
    """Divide a batch into batches of sequences that masks pad alike, and cut the padding away.

    Masks are ``(sequences, length)`` under names that end in ``attention_mask``, or ``(questions, choices, length)``,
    and ``pixel_mask``, ``(images, height, width)``. Those of an encoder or decoder beside another go with the inputs
    whose names begin alike. Sequences of which nothing is left are left out.

    Args:
        model: What the batch is for.
        batch: Its inputs, the sequences along their first dimensions.
        choices_apart: Makes each choice that is padded a question of its own, without what a batch holds of whole
            questions, such as labels; else such a batch stays as it is.

    Raises:
        ValueError: If a mask has the shape of no input, hides all positions, or some between others.
    """
    named = {name: mask for name, mask in batch.items() if name.endswith(("attention_mask", "pixel_mask"))}
    # One of no such inputs, as Longformer's global_attention_mask, tells something else.
    inputs = ["", *_SIDES, *(name for name in batch if name not in named)]
    masks = {name: mask for name, mask in named.items() if any(key.startswith(_prefix(name)) for key in inputs)}
    padded = {name: mask for name, mask in masks.items() if not mask.all()}
    dims = {name: _dims(model, name, batch, masks) for name in masks}
    for name, mask in masks.items():
        if not dims[name] and (name in padded or (mask.ndim > 2 and _prefix(name) in {"", *_SIDES})):
            listed = ", ".join(f"{key} {tuple(value.shape)}" for key, value in batch.items() if key not in masks)
            raise ValueError(
                f"{name} of shape {tuple(mask.shape)} tells of no input which positions are padding; it goes with "
                f"those that have its shape, and there are {listed or 'none'}"
            )
    choices = next((m for name, m in padded.items() if name.endswith("attention_mask") and m.ndim == 3), None)
    if not padded or (choices is not None and not choices_apart):
        yield batch
        return
    if choices is not None:
        of_choices = {key: value for key, value in batch.items() if value.shape[:2] == choices.shape[:2]}
        batch = {key: value.flatten(0, 1).unsqueeze(1) for key, value in of_choices.items()}
        padded = {name: batch[name] for name in padded}
    yield from _groups(batch, padded, dims)


def _groups(batch: Batch, padded: Batch, dims: Mapping[str, Mapping[str, int]]) -> Iterator[Batch]:
    mask = next(iter(padded.values()))
    rows: dict[tuple[Extent, ...], list[int]] = {}
    for row in range(len(mask)):
        extents = tuple(_extent(name, each[row]) for name, each in padded.items())
        if all(extents):
            rows.setdefault(extents, []).append(row)
    if not rows:
        raise ValueError(f"{', '.join(padded)} leaves no position: is every position masked?")
    for extents, chosen in rows.items():
        part = {key: _of_sequences(key, value, mask, chosen) for key, value in batch.items()}
        for name, extent in zip(padded, extents, strict=True):
            for key, first in dims[name].items():
                for dim, (start, stop) in enumerate(extent, first):
                    part[key] = part[key].narrow(dim, start, stop - start)
        yield part


def _of_sequences(key: str, value: Tensor, mask: Tensor, chosen: list[int]) -> Tensor:
    """The part of an input that belongs to some of the sequences of a mask; all of it where it belongs to none."""
    dim = _first_dim(key, value, mask)
    if value.shape[dim : dim + 1] == mask.shape[:1]:
        return value.index_select(dim, torch.tensor(chosen, device=value.device))
    if key.startswith("pixel_values") and value.ndim == 2 and len(chosen) < len(mask):  # patches, as of Qwen2-VL
        raise ValueError(
            f"{key} of shape {tuple(value.shape)} does not tell which patches belong to which of {len(mask)} sequences "
            "that are padded differently: give each of these in a calibration batch of its own"
        )
    return value


def _first_dim(key: str, value: Tensor, mask: Tensor) -> int:
    """The dimension of sequences; ``position_ids`` of images have those of time, height and width before it."""
    return value.ndim - mask.ndim if key == "position_ids" else 0


def _dims(model: nn.Module, name: str, batch: Batch, masks: Batch) -> dict[str, int]:
    """First dimension of positions in a mask and in each input that it goes with; nothing if there is no such input."""
    own, mask = _prefix(name), masks[name]
    others = tuple(({_prefix(each) for each in masks} | _SIDES) - {own, ""})
    has_two_sides = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    found = {}
    for key, value in batch.items():
        side = f"decoder_{key}" if has_two_sides and key == "labels" else key
        first = _first_dim(key, value, mask)
        sizes = [mask.shape[:1], (1,)] if key == "position_ids" else [mask.shape[:1]]
        is_of_others = key in masks or not side.startswith(own) or side.startswith(others)
        if is_of_others or value.shape[first : first + 1] not in sizes:
            continue
        # Positions come after the sequences, or after the channels of these.
        places = (dim + first for dim in (1, 2) if value.shape[dim + first :][: mask.ndim - 1] == mask.shape[1:])
        if (dim := next(places, None)) is not None:
            found[key] = dim
    return {name: 1, **found} if found else {}


def _prefix(name: str) -> str:
    """Return the beginning of the names of the inputs that a mask goes with."""
    return name.removesuffix("attention_mask").removesuffix("mask")


def _extent(name: str, mask: Tensor) -> Extent:
    """Return the extent that the mask of one sequence leaves; empty if it hides all."""
    places = mask.nonzero()
    if not len(places):
        return ()
    start, stop = places.amin(0), places.amax(0) + 1
    if len(places) < math.prod((stop - start).tolist()):
        raise ValueError(
            f"{name} hides positions between others; calibration takes padding before and after a sequence: leave "
            "such sequences out, or cut them in two"
        )
    return tuple(zip(start.tolist(), stop.tolist(), strict=True))
