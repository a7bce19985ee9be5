"""Calibration data: batches that are checked, and what a model makes of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import TransformersKwargs

from hf_fnl.surgery.blocks import run_over, tensors_in
from hf_fnl.surgery.padding import Batch, unpadded
from hf_fnl.surgery.sensitivity import Probe, sensitivities
from hf_fnl.utils.modes import preserved_modes
from hf_fnl.utils.suggest import did_you_mean

Calibration: TypeAlias = Batch | Iterable[Batch]


class CalibrationData:
    """Batches that are checked, and the sensitivities of layers, measured once.

    Args:
        model: The model that is calibrated.
        batches: Its inputs: one batch, or several. Masks, ``(sequences, length)`` under names that end in
            ``attention_mask``, tell padding.

    Raises:
        ValueError: If there are none, they are not finite, or they are under a name that the model would ignore.
        TypeError: If they are no mappings from names to tensors.
    """

    def __init__(self, model: nn.Module, batches: Calibration) -> None:
        self.model: nn.Module = model
        self.batches: Sequence[Batch] = [batches] if isinstance(batches, Mapping) else list(batches)
        if not self.batches:
            raise ValueError("there are no calibration batches")
        for number, batch in enumerate(self.batches):
            _check(f"calibration batch {number}" if len(self.batches) > 1 else "the calibration batch", batch)
            if set(batch) != set(self.batches[0]):
                raise ValueError(
                    f"calibration batches have different keys: {', '.join(self.batches[0]) or 'none'} in the first, "
                    f"{', '.join(batch) or 'none'} in number {number}"
                )
        _check_taken(model, self.batches[0])
        self._sensitivities: dict[str, Tensor | None] = {}  # None where no gradient flows

    @property
    def is_felt(self) -> bool:
        """Whether sensitivities were measured, and gradients flowed."""
        return any(found is not None for found in self._sensitivities.values())

    def sensitivities(self, probes: Mapping[str, Probe]) -> Mapping[str, Tensor]:
        """Return :func:`~hf_fnl.surgery.sensitivity.sensitivities` of outputs."""
        missing = {name: probe for name, probe in probes.items() if name not in self._sensitivities}
        if missing:
            with evaluating(self.model):
                parts = [part for batch in self.batches for part in unpadded(self.model, batch)]
                self._sensitivities |= {**dict.fromkeys(missing), **sensitivities(self.model, parts, missing)}
        return {name: found for name in probes if (found := self._sensitivities[name]) is not None}

    @torch.no_grad()
    def only_read(self, layers: Mapping[str, Sequence[nn.Module]]) -> list[str]:
        """Return the names of layers that the model does not call though it reads their weight, as for a kernel.

        It runs over a part of the first batch; what that does not reach is none of them.

        Args:
            layers: Layers by names, those of one name with one weight.
        """
        weights = {id(holders[0].weight): name for name, holders in layers.items()}
        called: set[str] = set()
        with evaluating(self.model), contextlib.ExitStack() as stack, _Reads(weights) as reads:
            for name, holders in layers.items():
                note = functools.partial(lambda name, layer, args: called.add(name), name)
                for layer in holders:
                    stack.callback(layer.register_forward_pre_hook(note).remove)
            run_over(self.model, next(unpadded(self.model, self.batches[0])))
        return [name for weight, name in weights.items() if weight in reads.found and name not in called]


class _Reads(TorchFunctionMode):
    """Notes which tensors, of those with some ids, an operation is given."""

    def __init__(self, ids: Iterable[int]) -> None:
        super().__init__()
        self.ids, self.found = frozenset(ids), set[int]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.found |= self.ids.intersection(map(id, tensors_in((args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without torch's fast path, which does not call the layers of an encoder."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with preserved_modes(model):
            model.eval()
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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


def _check(which: str, batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise TypeError(f"{which} must be a mapping from the names of the model's inputs to tensors, got {batch!r:.80}")
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} in {which} must be a tensor, got {type(value).__name__}")
        if value.is_floating_point() and not name.endswith("mask") and not value.isfinite().all():
            raise ValueError(f"{name} in {which} holds NaN or Inf")
