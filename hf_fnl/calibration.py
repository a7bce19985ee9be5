"""Truncation while data run through a model: every layer is replaced when the data reach it.

One forward pass over one batch visits the layers in the order of execution. What a layer sees comes from layers that
are replaced already, and only one layer's moments are in memory at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_fnl.layers.span import Span
from hf_fnl.truncation import HeadMoments, Moments

Batch = Mapping[str, Tensor]
Calibration = Batch | Sequence[Batch]


@dataclass
class Call:
    """A call of a module that is being visited.

    Args:
        module: The module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        masks: Of the batch, each ``(sequences, length)`` and true at positions that are no padding.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    masks: tuple[Tensor, ...]
    _forward: Callable[..., Any] = field(repr=False)

    def input_moments(self) -> Moments:
        """Moments of what the module is given, as :meth:`samples` takes them."""
        given = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return Moments.of(self.samples(given))

    def head_moments(self, query: Span, key: Span, output: nn.Module, num_heads: int) -> HeadMoments:
        """Moments of what flows through the heads of an attention, which runs once more for it.

        Args:
            query: Outputs of a layer inside the module that are the queries of all heads, side by side.
            key: Likewise.
            output: Layer inside the module that is given the contexts of all heads, side by side.
            num_heads: Number of heads.
        """
        seen: dict[str, Tensor] = {}
        hooks = [
            query.layer.register_forward_hook(lambda module, args, result: seen.update(query=query.of(result))),
            key.layer.register_forward_hook(lambda module, args, result: seen.update(key=key.of(result))),
            output.register_forward_pre_hook(lambda module, args: seen.update(context=args[0])),
        ]
        try:
            self._forward(*self.args, **self.kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        by_head = {name: self.samples(x).unflatten(-1, (num_heads, -1)).transpose(0, 1) for name, x in seen.items()}
        return HeadMoments(**{name: Moments.of(samples) for name, samples in by_head.items()})

    def samples(self, x: Tensor) -> Tensor:
        """Vectors of shape ``(..., n)`` as ``(count, n)``, without those at positions that a mask of their shape hides.

        Masks of an encoder and a decoder may have the same shape; what one of them hides is left out.
        """
        valid = [mask for mask in self.masks if x.ndim == 3 and mask.shape == x.shape[:2]]
        return x[torch.stack(valid).all(0)] if valid else x.flatten(0, -2)


# Gets a call before it happens and returns the module that is to answer it, ``None`` for the one that was called.
Visitor = Callable[[Call], nn.Module | None]


def for_each(
    model: nn.Module,
    names: Iterable[str],
    handle: Callable[[str, Call | None], nn.Module | None],
    calibration: Calibration | None,
) -> None:
    """Handle modules of a model by name: one after the other, or, given data, each when these reach it.

    Args:
        model: Any model.
        names: Names of modules.
        handle: Gets a name and, where there are data, the call; returns as a visitor of :func:`visit` does.
        calibration: Inputs of the model, one batch or several.
    """
    if calibration is None:
        for name in names:
            handle(name, None)
    else:
        visit(model, calibration, {name: functools.partial(handle, name) for name in names})


@torch.no_grad()
def visit(model: nn.Module, batch: Calibration, visitors: Mapping[str, Visitor]) -> dict[str, nn.Module]:
    """Run data through a model, with a visitor at every module that is named.

    The model itself stays as it is: what a visitor returns answers in this pass only. Dropout is off.

    Args:
        model: Any model; called with the batch as keyword arguments.
        batch: Inputs, or several that are joined into one: the whole of it runs at once, so memory is that of its
            widest activation. Masks, whose names end in ``attention_mask``, tell padding apart.
        visitors: A visitor for each name of a module, called when the data first reach it.

    Returns:
        The modules that answered, by name, in the order of execution.

    Raises:
        ValueError: If the data never reach a module that is named, or there are none, or they cannot be joined.
    """
    batch = join_batches(batch)
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items()}
    config = getattr(model, "config", None)
    options = {"use_cache": False} if hasattr(config, "use_cache") else {}
    # Multiple choice runs its choices as sequences of their own.
    masks = tuple(mask.bool().flatten(0, -2) for name, mask in inputs.items() if name.endswith("attention_mask"))
    found: dict[str, nn.Module] = {}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with _visited(model, visitors, masks, found):
            model(**inputs, **options)
    finally:
        for module, mode in training.items():
            module.training = mode
    if missed := [name for name in visitors if name not in found]:
        raise ValueError(f"the calibration data never reach {', '.join(missed)}; leave them out, or add their inputs")
    return found


@contextmanager
def _visited(
    model: nn.Module, visitors: Mapping[str, Visitor], masks: tuple[Tensor, ...], found: dict[str, nn.Module]
) -> Iterator[None]:
    modules = {name: model.get_submodule(name) for name in visitors}

    def answer(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name not in found:
            answering = visitors[name](Call(modules[name], args, kwargs, masks, forward))
            found[name] = modules[name] if answering is None else answering
        successor = found[name]
        return forward(*args, **kwargs) if successor is modules[name] else successor(*args, **kwargs)

    own = {module: module.__dict__.get("forward") for module in modules.values()}
    for name, module in modules.items():
        module.forward = functools.partial(answer, name, module.forward)
    try:
        yield
    finally:
        for module, forward in own.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def join_batches(batches: Calibration) -> Batch:
    """One batch from several, padded with zeros at the end of each dimension to the size of the largest.

    Raises:
        ValueError: If there is none, their keys differ, or there is padding and no mask to tell.
    """
    if isinstance(batches, Mapping):
        return batches
    batches = list(batches)
    if not batches:
        raise ValueError("there are no calibration batches")
    if len({frozenset(batch) for batch in batches}) > 1:
        raise ValueError("calibration batches have different keys: " + "; ".join(", ".join(batch) for batch in batches))
    joined = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    padded = [
        name for name, whole in joined.items() if {batch[name].shape[1:] for batch in batches} != {whole.shape[1:]}
    ]
    if padded and not any(name.endswith("attention_mask") for name in padded):
        raise ValueError(f"calibration batches differ in the length of {', '.join(padded)}: give an attention_mask")
    return joined


def _joined(values: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    joined = values[0].new_zeros(sum(len(value) for value in values), *shape)
    for part, value in zip(joined.split([len(value) for value in values]), values, strict=True):
        part[tuple(slice(size) for size in value.shape)] = value
    return joined
