"""The dense weight of a factorized layer, for code that looks at it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_DESCRIPTION = frozenset(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "is_meta"))


class DenseWeight(Tensor):
    """A tensor that is multiplied out when an operation needs its values.

    Models look at ``layer.weight.dtype`` in every forward pass (T5 three times), which must not cost a product.
    """

    _compose: Callable[[], Tensor]
    _is_hf_initialized: bool

    @classmethod
    def of(cls, shape: Sequence[int], like: Tensor, compose: Callable[[], Tensor]) -> DenseWeight:
        """A weight of this shape, in the dtype and on the device of ``like``, that ``compose`` multiplies out."""
        # Not by `like` itself, which under FSDP2 would make a DTensor.
        weight = torch.empty((), dtype=like.dtype, device=like.device).expand(shape).as_subclass(cls)
        weight._compose = compose
        weight._is_hf_initialized = True  # Transformers' initialization passes it by: what it wrote would be lost
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what describes a tensor; compose for all else."""
        if func in _DESCRIPTION:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        args, kwargs = pytree.tree_map_only(DenseWeight, lambda weight: weight._compose(), (args, kwargs or {}))
        return func(*args, **kwargs)
