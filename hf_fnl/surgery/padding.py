"""Padding followed through a model: which of the vectors that reach a layer depend on what an attention mask hides.

No shape tells it. What a mask hides gets a tangent (forward-mode automatic differentiation), and of the vectors that
reach a layer those count whose tangent is zero: those that do not depend on what is hidden, wherever the model has
moved them, be it flattened, transposed, cut into windows or routed to an expert. That takes twice the memory, and
attention without a fused kernel; without padding nothing is differentiated, so sequences of one length are the cheaper
data.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from hf_fnl.layers import FactorizedEmbedding
from hf_fnl.utils.suggest import listed

# From vectors of shape (..., n) those that count, (count, n).
SelectUnmasked: TypeAlias = Callable[[Tensor], Tensor]


@contextmanager
def masked_positions_tracked(
    model: nn.Module, inputs: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Any], SelectUnmasked]]:
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
    marks = _MaskTangents({name: (inputs[name], where) for name, where in hidden.items()}, generator)
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
            f"{type(model).__name__} does not embed {listed(unseen, 8)} as they are, so their padding cannot be "
            "followed: give calibration data without padding, as sequences cut to one length"
        )


def _hidden(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where each input is hidden by the mask that goes with it, of the input's shape but for a dimension of vectors."""
    masks = {name: value for name, value in inputs.items() if name.endswith(("attention_mask", "pixel_mask"))}
    prefixes = {name.removesuffix("attention_mask") for name in masks} | {"encoder_", "decoder_"}
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        own = name.removesuffix("attention_mask").removesuffix("mask")
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


class _MaskTangents:
    """Forward-mode tangents at masked positions: what has one, further on, depends on padding.

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


def _all_vectors(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
