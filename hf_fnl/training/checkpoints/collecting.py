"""The part of a training that this process writes, and putting back what it holds from what all have written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_fnl.optim.sharding import shards_of
from hf_fnl.training.checkpoints.contents import (
    MASTER,
    WEIGHT,
    Held,
    aliases,
    dtypes_of,
    held_states,
    held_weights,
    number,
    whole_copies,
)
from hf_fnl.training.checkpoints.pieces import PIECES_FILES, Pieces, Range, write_pieces
from hf_fnl.utils.processes import replica

OPTIMIZER_FILE = "optimizer.json"

_MODEL_FILES = f"{Path(SAFE_WEIGHTS_NAME).stem}*.safetensors"
_NOT_OPTIONS = ("params", "param_names")


@dataclass
class Part:
    """What one process writes: pieces under ``head/name``, and numbers of the optimizer's state by name."""

    pieces: dict[str, tuple[Range, Tensor]]
    numbers: dict[str, dict[str, Any]]

    def on_host(self) -> Part:
        """A copy in the memory of the CPU, which training does not change."""
        pieces = {key: (span, piece.to("cpu", copy=True)) for key, (span, piece) in self.pieces.items()}
        return replace(self, pieces=pieces)

    def write(self, path: Path) -> None:
        """Write it into a file."""
        write_pieces(path, self.pieces, {"numbers": self.numbers})


def collect(model: nn.Module, optimizer: Optimizer | None, *, weights: bool) -> Part:
    """The part of a training that this process writes; together, without a copy, that of all is the whole.

    All processes must call this.

    Args:
        model: Without its wrappers.
        optimizer: Without its wrappers; ``None`` to leave its state out.
        weights: Whether the weights of the model are included.

    Raises:
        UnsupportedStateError: If the state of the optimizer is none that can be divided.
    """
    held = list(held_weights(model)) if weights else []
    held += held_states(optimizer, dtypes_of(model)) if optimizer is not None else []
    groups = {each.group for each in held if each.group is not None}
    assert len(groups) <= 1, "parameters are divided among one group of processes"
    divided = [each for each in held if each.group is not None]
    part = Part({}, {each.name: each.numbers for each in held if each.numbers})
    for copies, group in ((divided, next(iter(groups), None)), ([each for each in held if each.group is None], None)):
        part.pieces.update(_cut(copies, *replica(group)))
    return part


def _cut(held: list[Held], index: int, count: int) -> Iterator[tuple[str, tuple[Range, Tensor]]]:
    """One of ``count`` parts, alike in size, of what as many processes hold."""
    sizes = [(each.stop - each.start) * len(each.tensors) for each in held]
    total, begin = sum(sizes), 0
    low, high = total * index // count, total * (index + 1) // count
    for each, size in zip(held, sizes, strict=True):
        heads = len(each.tensors) or 1
        # Rounded up in the same way on both sides, so that neighbours meet.
        first, last = (min(max(-(-(edge - begin) // heads), 0), size // heads) for edge in (low, high))
        begin += size
        if first < last:
            span = Range(each.shape, each.start + first, each.start + last)
            for head, tensor in each.tensors.items():
                yield f"{head}/{each.name}", (span, tensor.reshape(-1)[first:last])


def opened(checkpoint: Path) -> Pieces:
    """What is in a checkpoint, whichever processes wrote it; for a ``with`` statement."""
    return Pieces(sorted(checkpoint.glob(PIECES_FILES)), sorted(checkpoint.glob(_MODEL_FILES)))


@torch.no_grad()
def restore_weights(stored: Pieces, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Put back what this process holds of the weights of a model, also those that the optimizer holds for itself.

    Args:
        stored: From :func:`opened`.
        model: Without its wrappers.
        optimizer: Without its wrappers, if there is one already.

    Raises:
        KeyError: If a weight is not in the checkpoint.
        ValueError: If it has another shape there.
    """
    names = aliases(model)
    # Located before the weights change: an engine's copies are compared with the model's when first met.
    fragments = shards_of(optimizer).fragments().values() if optimizer is not None else ()
    masters = [Held(f.name, f.shape, f.start, f.stop, f.group, {WEIGHT: f.local}) for f in fragments]
    constant = set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # as sinusoidal positions: in no model file
    for held in (*held_weights(model), *whole_copies(model), *masters):
        tensor = held.tensors[WEIGHT]
        key = _stored_key(stored, names.get(held.name, [held.name]))
        if held.stop > held.start and (key in stored or held.name not in constant):
            _check_shape(stored, key, held)
            tensor.copy_(stored.read(key, held.start, held.stop).view(tensor.shape))


def _stored_key(stored: Pieces, names: Iterable[str]) -> str:
    """Where a weight lies, in the widest dtype that it was saved in, under one of its names."""
    keys = [f"{head}/{name}" for head in (MASTER, WEIGHT) for name in names]
    return next((key for key in keys if key in stored), keys[-1])


def _check_shape(stored: Pieces, key: str, held: Held) -> None:
    if key in stored and stored.shapes[key] != held.shape:
        raise ValueError(
            f"{held.name} has shape {stored.shapes[key]} in the checkpoint and {held.shape} in the model: build the "
            "model as it was"
        )


@torch.no_grad()
def restore_state(stored: Pieces, optimizer: Optimizer) -> None:
    """Put back what this process holds of the state of an optimizer.

    Args:
        stored: From :func:`opened`.
        optimizer: Without its wrappers, over the parameters of the same model.

    Raises:
        ValueError: If a state has another shape in the checkpoint.
    """
    heads = defaultdict(list)
    for key in stored:
        head, _, name = key.partition("/")
        if head not in (WEIGHT, MASTER):
            heads[name].append(head)
    numbers = {name: values for facts in stored.facts for name, values in facts["numbers"].items()}
    for fragment in shards_of(optimizer).fragments().values():
        state = optimizer.state[fragment.owner] if fragment.name in heads or fragment.name in numbers else {}
        for head in heads[fragment.name]:
            held = Held(fragment.name, fragment.shape, fragment.start, fragment.stop, fragment.group, {})
            _check_shape(stored, key := f"{head}/{fragment.name}", held)
            if head not in state:
                state[head] = torch.zeros_like(fragment.owner, memory_format=torch.preserve_format)
            part = fragment.part(state[head])
            part.copy_(stored.read(key, fragment.start, fragment.stop).view(part.shape))
        for head, (tag, value) in numbers.get(fragment.name, {}).items():
            state[head] = number(tag, value)
    _settle(optimizer)


def _settle(optimizer: Optimizer) -> None:
    """Let an optimizer take up the state that it was given, as ``load_state_dict`` does."""
    for group in optimizer.param_groups:
        on_device = group.get("capturable") or group.get("fused")
        for parameter in group["params"]:
            step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
            if on_device and isinstance(step, Tensor):
                optimizer.state[parameter]["step"] = step.to(parameter.device, torch.float32)
    optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group of an optimizer, and the names of its parameters."""
    return [
        {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def restore_options(saved: list[dict[str, Any]], optimizer: Optimizer) -> None:
    """Give each group the options that its parameters had."""
    group_of = {name: group for group in saved for name in group.get("param_names", ())}
    for group in optimizer.param_groups:
        options = next((group_of[name] for name in group.get("param_names", ()) if name in group_of), {})
        for key, value in options.items():
            if key not in _NOT_OPTIONS:
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
