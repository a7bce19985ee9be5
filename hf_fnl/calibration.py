"""Truncation while data run through a model: every layer is replaced when the data reach it.

A forward pass over one batch visits the layers in the order of execution, and what a layer sees comes from layers that
are replaced already. Only one layer's moments are in memory at a time. A layer that the pass calls several times, as
those that ALBERT shares between its depths, is first left as it is for a pass of its own, in which the moments of all
its calls are pooled; what it sees there comes from the layers replaced so far, itself not among them.

**Padding** is followed, not guessed from shapes. What an attention mask hides gets a tangent (forward-mode automatic
differentiation), and of the vectors that reach a layer those count whose tangent is zero: exactly those that do not
depend on what is hidden, wherever the model has moved them, be it flattened, transposed, cut into windows or routed to
an expert. That takes twice the memory and attention without a fused kernel; without padding nothing is differentiated,
so sequences of one length are the cheaper data.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from hf_fnl.layers import FactorizedEmbedding
from hf_fnl.layers.span import Span
from hf_fnl.truncation import HeadMoments, Moments

Batch: TypeAlias = Mapping[str, Tensor]
Calibration: TypeAlias = Batch | Sequence[Batch]


@dataclass(frozen=True)
class Heads:
    """Asks for the moments of what flows through the heads of an attention.

    Args:
        query: Outputs of a layer inside the attention that are the queries of all heads, side by side.
        key: Likewise.
        output: Layer inside the attention that is given the contexts of all heads, side by side.
        num_heads: Number of heads.
    """

    query: Span
    key: Span
    output: nn.Module
    num_heads: int


# What is measured where a module is called: moments of its inputs, those of its heads, or nothing.
Request: TypeAlias = Literal["inputs"] | Heads | None
Measured: TypeAlias = Moments | HeadMoments | None
# Gets a name and what was measured there; returns what answers in the module's place, or in the places of several that
# are handled at once; ``None`` for the module itself.
Handler: TypeAlias = Callable[[str, Any], nn.Module | Mapping[nn.Module, nn.Module] | None]
Ties: TypeAlias = Mapping[str, Sequence[str]]
# From vectors of shape (..., n) those that count, (count, n).
Visible: TypeAlias = Callable[[Tensor], Tensor]


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
            widest activation. Masks, ``(sequences, length)`` under names that end in ``attention_mask``, tell padding.
        requests: What to measure at each module that is named.
        handle: As :func:`for_each` takes it.
        ties: Likewise.

    Returns:
        The modules that answered, by name, in the order of execution.

    Raises:
        ValueError: If no token reaches a module that is named, or there are no data, or they cannot be joined, are not
            finite, or hide positions that cannot be followed.
        TypeError: If the data are no mappings from names to tensors.
    """
    batch = join_batches(batch)
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    with _evaluating(model), _hidden_marked(model, inputs) as (marked, visible):
        visited = _Visited(model, requests, handle, visible, ties or {})
        with visited.answering():
            while visited.is_unfinished():
                model(**marked)
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
        self.successors: dict[nn.Module, nn.Module] = {}
        self.repeated: set[str] = set()  # called several times in a pass
        self.calls: Counter[str] = Counter()  # of this pass
        self.fresh: list[str] = []  # handled in this pass
        self.pooled: tuple[str, Any] | None = None  # the module whose calls this pass pools, and their moments so far
        self.hidden: set[str] = set()  # all that reached these was hidden by a mask
        self.has_begun = False

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
                f"no position that the attention mask leaves reaches {_listed(hidden)}, or all depend on those that it "
                "hides: is every position masked? If the model does not heed the mask, leave it out"
            )
        return (
            f"the calibration data never reach {_listed(missed)}; no token was routed there, or inputs are missing: "
            "leave it out, or give more data"
        )

    def _handle(self, name: str, measured: Measured) -> None:
        module, answering = self.modules[name], self.handle(name, measured)
        self.successors.update({module: answering} if isinstance(answering, nn.Module) else answering or {})
        self.found[name] = self.successors.get(module, module)
        self.fresh.append(name)

    def _answer(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = self.names[module]
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, Tensor) and given.numel() == 0:
            return forward(*args, **kwargs)  # an expert without tokens
        self.calls[name] += 1
        if name not in self.found and (self.pooled is None or self.pooled[0] == name):
            call = functools.partial(forward, *args, **kwargs)
            measured = _measure(name, self.requests[name], given, call, self.visible)
            if measured is None and self.requests[name] is not None:
                self.hidden.add(name)
            elif name in self.repeated and self.requests[name] is not None:
                self.pooled = name, measured if self.pooled is None else self.pooled[1].joined(measured)
            else:
                self._handle(name, measured)
        successor = self.successors.get(module) if name in self.found else None
        return forward(*args, **kwargs) if successor is None else successor(*args, **kwargs)

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
    seen: dict[str, list[Tensor]] = {"query": [], "key": [], "context": []}

    def note(name: str, x: Tensor) -> None:
        seen[name].append(_samples(x, visible).unflatten(-1, (heads.num_heads, -1)).transpose(0, 1))

    hooks = [
        heads.query.layer.register_forward_hook(lambda module, args, result: note("query", heads.query.of(result))),
        heads.key.layer.register_forward_hook(lambda module, args, result: note("key", heads.key.of(result))),
        heads.output.register_forward_pre_hook(lambda module, args: note("context", args[0])),
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    samples = {name: torch.cat(parts, 1) for name, parts in seen.items()}
    if not all(x.shape[1] for x in samples.values()):
        return None
    return HeadMoments(**{name: Moments.of(x) for name, x in samples.items()})


def _samples(x: Tensor, visible: Visible) -> Tensor:
    samples = visible(x)
    if not len(samples) and not x.isfinite().all():
        raise ValueError("calibration vectors hold NaN or Inf")  # which would otherwise pass for hidden
    return samples


def _all_vectors(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


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


@contextmanager
def _hidden_marked(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Visible]]:
    """Give all that masks hide a tangent: in the inputs, which are returned, and where the model embeds them.

    Returned is also what tells the vectors that do not depend on it.

    Raises:
        ValueError: If a mask hides positions of no input, or of one that the model does not embed as it is, or if the
            model runs an operation that has no forward derivative.
    """
    hidden = {name: where for name, where in _hidden(inputs).items() if where.any()}
    if not hidden:
        yield inputs, _all_vectors
        return
    generator = torch.Generator(next(iter(hidden.values())).device).manual_seed(0)
    marks = _Marks({name: (inputs[name], where) for name, where in hidden.items()}, generator)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | FactorizedEmbedding)]
    with ExitStack() as stack:
        for embedding in embeddings:
            stack.enter_context(embedding.register_forward_hook(marks.mark_embedded, with_kwargs=True))
        for module in (module for module in model.modules() if next(module.children(), None) is not None):
            stack.enter_context(module.register_forward_pre_hook(marks.mark_zeros, with_kwargs=True))
        # The first derivative of some operations loads torch's own code for them, which calls what torch deprecates.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no forward derivative
        stack.enter_context(_eager_experts(model))
        try:
            yield {**inputs, **marks.marked_inputs()}, marks.visible
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward mode AD" not in str(error):
                raise
            raise ValueError(
                f"the padding that an attention mask hides cannot be followed through {type(model).__name__}: "
                f"give calibration data without padding, as sequences cut to one length. {error}"
            ) from error
    if unseen := sorted(set(marks.ids) - marks.embedded):
        raise ValueError(
            f"{type(model).__name__} does not embed {_listed(unseen)} as they are, so their padding cannot be "
            "followed: give calibration data without padding, as sequences cut to one length"
        )


def _hidden(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where each input is hidden by the mask that goes with it, of the input's shape but for a dimension of vectors."""
    masks = {name: value for name, value in inputs.items() if name.endswith("attention_mask")}
    prefixes = {name.removesuffix("attention_mask") for name in masks} | {"encoder_", "decoder_"}
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        own = name.removesuffix("attention_mask")
        others = tuple(prefix for prefix in prefixes - {own} if prefix)
        contents = {
            key: value
            for key, value in inputs.items()
            if isinstance(value, Tensor) and key not in masks and key.startswith(own) and not key.startswith(others)
        }
        known = {
            key: where
            for key, value in contents.items()
            if (value.is_floating_point() or key.endswith("input_ids"))
            and (where := _aligned(mask == 0, value)) is not None
        }
        if not known and own in ("", "encoder_", "decoder_") and (mask.ndim > 2 or not mask.all()):
            listed = ", ".join(f"{key} {tuple(value.shape)}" for key, value in contents.items())
            raise ValueError(
                f"{name} of shape {tuple(mask.shape)} tells of no input which positions are padding; it goes with "
                f"those that have its shape, and there are {listed or 'none'}"
            )
        found |= known
    return found


def _aligned(where: Tensor, value: Tensor) -> Tensor | None:
    """Positions of a mask as they lie in an input: of its shape, or of its shape but for one dimension, then 1."""
    if where.shape == value.shape:
        return where
    for dim in reversed(range(1, value.ndim)):
        if where.shape == value.shape[:dim] + value.shape[dim + 1 :]:
            return where.unsqueeze(dim)
    return None


class _Marks:
    """Tangents on what masks hide.

    Args:
        hidden: Inputs and where they are hidden, by name.
        generator: Of the tangents, which are random, for a constant one would be lost in the next normalization.
    """

    def __init__(self, hidden: Mapping[str, tuple[Tensor, Tensor]], generator: torch.Generator) -> None:
        self._hidden, self._generator = hidden, generator
        self.ids = [name for name, (value, _) in hidden.items() if not value.is_floating_point()]
        self.embedded: set[str] = set()  # ids that have been embedded
        self._layouts: dict[torch.Size, list[tuple[str, Tensor, Tensor]]] = {}
        for name, (value, where) in hidden.items():
            if not value.is_floating_point():
                value, where = value.flatten(0, -2), where.flatten(0, -2)
                self._add(name, value, where)
            elif where.shape[-1] == 1:
                self._add(name, value, where.squeeze(-1))

    def _add(self, name: str, value: Tensor, where: Tensor) -> None:
        """Note how the positions of an input may lie: as they are, transposed or flattened."""
        values = (value, value.transpose(0, 1), value.flatten(0, 1))
        for laid, hidden in zip(values, (where, where.transpose(0, 1), where.flatten(0, 1)), strict=True):
            self._layouts.setdefault(hidden.shape, []).append((name, laid, hidden))

    def _add_longer(self, ids: Tensor) -> None:
        """Note the layouts of ids that the model has padded further, to a multiple of its attention window."""
        for name in self.ids if ids.ndim == 2 and ids.shape not in self._layouts else ():
            value, where = (x.flatten(0, -2) for x in self._hidden[name])
            extra = ids.shape[1] - value.shape[1]
            if extra > 0 and torch.equal(ids[:, : value.shape[1]], value):
                self._add(name, ids, nn.functional.pad(where, (0, extra), value=True))

    def _mark(self, x: Tensor, where: Tensor) -> Tensor:
        primal, tangent = forward_ad.unpack_dual(x)
        drawn = torch.randn(x.shape, generator=self._generator, device=x.device, dtype=x.dtype) * primal.abs().mean()
        drawn = drawn * where
        return forward_ad.make_dual(primal, drawn if tangent is None else tangent + drawn)

    def marked_inputs(self) -> dict[str, Tensor]:
        """The inputs that are vectors themselves, marked."""
        return {name: self._mark(x, where) for name, (x, where) in self._hidden.items() if x.is_floating_point()}

    def mark_embedded(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Mark what an embedding gives for ids that are hidden, as a forward hook."""
        ids = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or not isinstance(output, Tensor):
            return None
        self._add_longer(ids)
        # Whose ids these are, and how they lie, tell those that are not hidden.
        agreeing = {
            place: float((laid == ids)[~where].double().mean())
            for place, (name, laid, where) in enumerate(self._layouts.get(ids.shape, ()))
            if name in self.ids
        }
        best = max(agreeing, key=lambda place: agreeing[place], default=None)
        if best is None or agreeing[best] <= 0.5:
            return None
        name, _, where = self._layouts[ids.shape][best]
        self.embedded.add(name)
        return self._mark(output, where.unsqueeze(-1))

    def visible(self, x: Tensor) -> Tensor:
        """Vectors of shape ``(..., n)`` as ``(count, n)``, without those that masks hide and what depends on them."""
        primal, tangent = forward_ad.unpack_dual(x)
        hidden = self._zeroed(x)
        if hidden is None and tangent is not None:
            hidden = self._completed((tangent != 0).any(-1))
        return _all_vectors(primal if hidden is None else primal[~hidden])

    def _completed(self, depends: Tensor) -> Tensor:
        """All hidden positions, where those that depend on hidden ones are some of them, as far as these can be told.

        What a hidden position attends to does not depend on it if it is one token alone.
        """
        layouts = [where for *_, where in self._layouts.get(depends.shape, ()) if not (depends & ~where).any()]
        return min(layouts, key=lambda where: int(where.sum()), default=depends) if depends.any() else depends

    def mark_zeros(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Mark again what a model sets to zero exactly where a mask hides it, as a forward pre-hook.

        Of modules that hold others: a zero in front of a single layer, as state-space models put there, is its last.
        """
        if not any(map(self._is_zeroed, (*args, *kwargs.values()))):
            return None
        return tuple(map(self._marked_again, args)), {key: self._marked_again(value) for key, value in kwargs.items()}

    def _is_zeroed(self, x: Any) -> bool:
        return self._zeroed(x) is not None

    def _zeroed(self, x: Any) -> Tensor | None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[:-1] not in self._layouts:
            return None
        zeros = (x == 0).all(-1)
        return next((where for *_, where in self._layouts[x.shape[:-1]] if torch.equal(where, zeros)), None)

    def _marked_again(self, x: Any) -> Any:
        where = self._zeroed(x)
        return x if where is None else self._mark(x, where.unsqueeze(-1))


@contextmanager
def _eager_experts(model: nn.Module) -> Iterator[None]:
    """Experts one after the other, where a model may run them in one operation, which has no forward derivative."""
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


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


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
