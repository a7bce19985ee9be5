"""Truncation while data run through a model: every layer is replaced when the data reach it.

A forward pass over one batch visits the layers in the order of execution, and what a layer sees comes from layers that
are replaced already. Only one layer's moments are in memory at a time. A layer that the pass calls several times, as
those that ALBERT shares between its depths, is first left as it is for a pass of its own, in which the moments of all
its calls are pooled; what it sees there comes from the layers replaced so far, itself not among them.

Padding counts nowhere; see :mod:`hf_fnl.surgery.padding`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.utils import TransformersKwargs

from hf_fnl.layers.span import Span
from hf_fnl.math.truncation import HeadMoments, Moments
from hf_fnl.surgery.padding import Visible, hidden_marked
from hf_fnl.utils.suggest import did_you_mean, listed

Batch: TypeAlias = Mapping[str, Tensor]
Calibration: TypeAlias = Batch | Sequence[Batch]


@dataclass(frozen=True)
class Heads:
    """Asks for the moments of what flows through the heads of an attention.

    Args:
        num_heads: Heads of queries and contexts.
        num_kv_heads: Heads of keys and values; what several queries or contexts share one of is taken together.
        query: Outputs of a layer inside the attention that are the queries of all heads, side by side.
        key: Likewise.
        output: Layer inside the attention that is given the contexts of all heads, side by side.
    """

    num_heads: int
    num_kv_heads: int
    query: Span | None = None
    key: Span | None = None
    output: nn.Module | None = None


# What is measured where a module is called: moments of its inputs, those of its heads, or nothing.
Request: TypeAlias = Literal["inputs"] | Heads | None
Measured: TypeAlias = Moments | HeadMoments | None
# Gets a name and what was measured there; returns what answers in the module's place, or in the places of several that
# are handled at once, which may lie inside of it; ``None`` for the module itself.
Handler: TypeAlias = Callable[[str, Any], nn.Module | Mapping[nn.Module, nn.Module] | None]
Ties: TypeAlias = Mapping[str, Sequence[str]]


def for_each(
    model: nn.Module,
    requests: Mapping[str, Request],
    handle: Handler,
    calibration: Calibration | None,
    ties: Ties | None = None,
) -> None:
    """Handle modules of a model by name: one after the other, or, given data, each when these reach it.

    Args:
        model: Any model.
        requests: What to measure at each module that is named.
        handle: Gets a name and, where there are data, what was asked for; may be called again for a module that turns
            out to come after one that is called several times: what it does last counts.
        calibration: Inputs of the model, one batch or several.
        ties: Names of other modules whose calls count as calls of one that is named, for they hold its weight.
    """
    if calibration is None:
        for name in requests:
            handle(name, None)
    else:
        visit(model, calibration, requests, handle, ties)


@torch.no_grad()
def visit(
    model: nn.Module,
    batch: Calibration,
    requests: Mapping[str, Request],
    handle: Handler,
    ties: Ties | None = None,
) -> dict[str, nn.Module]:
    """Run data through a model and handle every module that is named when they have reached it.

    The model itself stays as it is: what a handler returns answers in these passes only. Dropout is off.

    Args:
        model: Any model; called with the batch as keyword arguments.
        batch: Inputs, or several batches that are joined into one: all of it runs at once, so memory is that of its
            widest activation. Masks, ``(sequences, length)`` under names that end in ``attention_mask``, tell padding,
            and so does a ``pixel_mask`` of images.
        requests: What to measure at each module that is named.
        handle: As :func:`for_each` takes it.
        ties: Likewise.

    Returns:
        The modules that answered, by name, in the order of execution.

    Raises:
        ValueError: If no token reaches a module that is named, or there are no data, or they cannot be joined, are not
            finite, hide positions that cannot be followed, or are under a name that the model would ignore.
        TypeError: If the data are no mappings from names to tensors.

    Warns:
        UserWarning: If fewer vectors reach a module than they are wide.
    """
    batch = join_batches(batch)
    device = next(model.parameters()).device
    _check_taken(model, batch)
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    with _evaluating(model), hidden_marked(model, inputs) as (marked, visible):
        visited = _Visited(model, requests, handle, visible, ties or {})
        with visited.answering():
            while visited.is_unfinished():
                model(**marked)
    visited.warn_of_few()
    return visited.found


@dataclass
class _Visited:
    """The modules that are handled, over as many passes as it takes."""

    model: nn.Module
    requests: Mapping[str, Request]
    handle: Handler
    visible: Visible
    ties: Ties
    found: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.modules = {name: self.model.get_submodule(name) for name in self.requests}
        self.names = {module: name for name, module in self.modules.items()}
        self.names |= {
            self.model.get_submodule(tied): name for name in self.modules for tied in self.ties.get(name, ())
        }
        self.replacements: dict[nn.Module, nn.Module] = {}
        self.repeated: set[str] = set()  # called several times in a pass
        self.calls: Counter[str] = Counter()  # of this pass
        self.fresh: list[str] = []  # handled in this pass
        self.pooled: tuple[str, Any] | None = None  # the module whose calls this pass pools, and their moments so far
        self.few: dict[str, str] = {}  # how many vectors reached these, where that is fewer than they are wide
        self.hidden: set[str] = set()  # all that reached these was hidden by a mask
        self.has_begun = self.is_measuring = False

    def is_unfinished(self) -> bool:
        """Close the pass that is over, if any, and tell whether it takes another."""
        last, self.has_begun = self.has_begun, True
        if last:
            again = [name for name in self.fresh if self.calls[name] > 1 and self.requests[name] is not None]
            self.repeated.update(name for name, count in self.calls.items() if count > 1)
            if again:
                # From the first of them on everything has seen what cannot count.
                order = list(self.found)
                for name in order[order.index(again[0]) :]:
                    del self.found[name]
            elif self.pooled is not None:
                self._handle(*self.pooled)
            elif missed := [name for name in self.requests if name not in self.found]:
                raise ValueError(self._complaint(missed))
        self.calls.clear()
        self.fresh, self.pooled = [], None
        return len(self.found) < len(self.requests) or not last

    def _complaint(self, missed: Sequence[str]) -> str:
        if hidden := [name for name in missed if name in self.hidden]:
            return (
                f"no position that the attention mask leaves reaches {listed(hidden, 8)}, or all depend on those that "
                "it hides: is every position masked? If the model does not heed the mask, leave it out"
            )
        return (
            f"the calibration data never reach {listed(missed, 8)}; no token was routed there, or inputs are missing: "
            "leave it out, or give more data"
        )

    def _handle(self, name: str, measured: Measured) -> None:
        module, answering = self.modules[name], self.handle(name, measured)
        self.replacements.update({module: answering} if isinstance(answering, nn.Module) else answering or {})
        self.found[name] = self.replacements.get(module, module)
        self.fresh.append(name)
        several = () if measured is None else vars(measured).values()
        for moments in (measured,) if isinstance(measured, Moments) else several:
            if moments is not None and moments.count < (width := moments.mean.shape[-1]):
                self.few[name] = f"{moments.count:,} vectors of {width:,} numbers"

    def warn_of_few(self) -> None:
        """Warn of modules in front of which the data cannot span all directions."""
        if self.few:
            name, seen = next(iter(self.few.items()))
            warnings.warn(
                f"few calibration data reach {listed(self.few, 4)}, as {seen} in front of {name}: what they do not "
                "span counts next to nothing; give more data",
                stacklevel=4,
            )

    def _answer(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = self.names[module]
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, Tensor) and given.numel() == 0:
            return forward(*args, **kwargs)  # an expert without tokens
        if self.is_measuring:  # around this module, which is called again afterwards
            return (self.replacements.get(module, forward) if name in self.found else forward)(*args, **kwargs)
        self.calls[name] += 1
        if name not in self.found and (self.pooled is None or self.pooled[0] == name):
            call = functools.partial(forward, *args, **kwargs)
            self.is_measuring = True
            measured = _measure(name, self.requests[name], given, call, self.visible)
            self.is_measuring = False
            if measured is None and self.requests[name] is not None:
                self.hidden.add(name)
            elif name in self.repeated and self.requests[name] is not None:
                self.pooled = name, measured if self.pooled is None else self.pooled[1].joined(measured)
            else:
                self._handle(name, measured)
        new = self.replacements.get(module) if name in self.found else None
        return forward(*args, **kwargs) if new is None else new(*args, **kwargs)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Have the modules answered for, their own forwards being as before afterwards."""
        own = {module: module.__dict__.get("forward") for module in self.names}
        for module in self.names:
            module.forward = functools.partial(self._answer, module, module.forward)
        try:
            yield
        finally:
            for module, forward in own.items():
                del module.forward
                if forward is not None:
                    module.forward = forward


def _measure(name: str, request: Request, given: Any, call: Callable[[], Any], visible: Visible) -> Measured:
    """What is asked for, of one call of a module; ``None`` if there is nothing to see in it."""
    try:
        if request == "inputs":
            samples = _samples(given, visible)
            return Moments.of(samples) if len(samples) else None
        return None if request is None else _head_moments(request, call, visible)
    except ValueError as error:
        raise ValueError(f"what reaches {name} cannot be used: {error}") from error


def _head_moments(heads: Heads, call: Callable[[], Any], visible: Visible) -> HeadMoments | None:
    """Moments of what flows through the heads of an attention, which runs for it."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        group = 1 if name == "key" else heads.num_heads // heads.num_kv_heads
        samples = _samples(x, visible).unflatten(-1, (heads.num_kv_heads, group, -1))
        seen.setdefault(name, []).append(samples.transpose(0, 1).flatten(1, 2))

    def note_span(name: str, span: Span, module: nn.Module, args: Any, result: Tensor) -> None:
        note(name, span.of(result))

    hooks = []
    for name, span in (("query", heads.query), ("key", heads.key)):
        if span is not None:
            hooks.append(span.layer.register_forward_hook(functools.partial(note_span, name, span)))
    if heads.output is not None:
        hooks.append(heads.output.register_forward_pre_hook(lambda module, args: note("context", args[0])))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    samples = {name: torch.cat(parts, 1) for name, parts in seen.items()}
    if not samples or not all(x.shape[1] for x in samples.values()):
        return None
    return HeadMoments(**{name: Moments.of(x) for name, x in samples.items()})


def _samples(x: Tensor, visible: Visible) -> Tensor:
    samples = visible(x)
    if not len(samples) and not x.isfinite().all():
        raise ValueError("calibration vectors hold NaN or Inf")  # which would otherwise pass for hidden
    return samples


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without torch's fast path, which does not call the layers of an encoder."""
    training = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in training.items():
            module.training = mode


def _check_taken(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a ``ValueError`` for an input that a model of Transformers, or of ours, would ignore without a word."""
    if type(model).__module__.partition(".")[0] not in ("transformers", "hf_fnl"):
        return
    forwards = {type(module).forward for module in model.modules()}
    taken = {name for forward in forwards for name in inspect.signature(forward).parameters}
    taken |= {"attention_mask", *TransformersKwargs.__annotations__}  # a mask tells padding to this module as well
    for name in names:
        if not {name, name.removeprefix("encoder_"), name.removeprefix("decoder_")} & taken:
            meant = did_you_mean(name, inspect.signature(model.forward).parameters)
            raise ValueError(
                f"{type(model).__name__} takes no {name}, and would ignore it: leave it out of the calibration{meant}"
            )


def join_batches(batches: Calibration) -> Batch:
    """One batch from several, padded with zeros at the end of each dimension to the size of the largest.

    Raises:
        ValueError: If there is none, their keys differ, values are not finite, or there is padding and no mask to tell.
        TypeError: If a batch is no mapping from names to tensors.
    """
    batches = [batches] if isinstance(batches, Mapping) else list(batches)
    if not batches:
        raise ValueError("there are no calibration batches")
    for number, batch in enumerate(batches):
        _check(f"calibration batch {number}" if len(batches) > 1 else "the calibration batch", batch)
        if set(batch) != set(batches[0]):
            raise ValueError(
                f"calibration batches have different keys: {', '.join(batches[0]) or 'none'} in the first, "
                f"{', '.join(batch) or 'none'} in number {number}"
            )
    if len(batches) == 1:
        return batches[0]
    joined = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
    padded = [
        name for name, whole in joined.items() if {batch[name].shape[1:] for batch in batches} != {whole.shape[1:]}
    ]
    if padded and not any(name.endswith("attention_mask") for name in padded):
        raise ValueError(f"calibration batches differ in the length of {', '.join(padded)}: give an attention_mask")
    return joined


def _check(which: str, batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"{which} must be a mapping from the names of the model's inputs to tensors, got {batch!r:.80}")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} in {which} must be a tensor, got {type(value).__name__}")
        if value.is_floating_point() and not name.endswith("mask") and not value.isfinite().all():
            raise ValueError(f"{name} in {which} holds NaN or Inf")


def _joined(values: Sequence[Tensor]) -> Tensor:
    if len({value.ndim for value in values}) > 1:
        raise ValueError(f"calibration batches of shapes {[tuple(value.shape) for value in values]} cannot be joined")
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    joined = values[0].new_zeros(sum(len(value) for value in values), *shape)
    for part, value in zip(joined.split([len(value) for value in values]), values, strict=True):
        part[tuple(slice(size) for size in value.shape)] = value
    return joined
