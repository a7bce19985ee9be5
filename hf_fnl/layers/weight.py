"""The dense weight of a factorized layer, for code that reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_fnl.math.precision import no_autocast

if TYPE_CHECKING:
    from typing_extensions import Self


class HoldsFactors(nn.Module):
    """Module that holds a weight only as factors; ``weight`` can be read, and nothing be written into it."""

    shape: tuple[int, ...]

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense layer's weight."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, ...]:
        """The factors in the order in which they are multiplied."""
        raise NotImplementedError

    def weight_from(self, *factors: Tensor) -> Tensor:
        """The dense layer's weight, in its layout, as a function of :meth:`factors`."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """The factors multiplied out, in the layout of the dense layer's weight."""
        return self.weight_from(*self.factors())

    @property
    def weight(self) -> Tensor:
        """The dense layer's weight, to be read: a :class:`DenseWeight`, or plain values for compilers and tracers.

        Raises:
            RuntimeError: If something is written into it, or put in its place.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.dense_weight()
        factors = self.factors()
        # As of a parameter, `requires_grad` does not depend on where it is asked for.
        with torch.set_grad_enabled(not any(factor.is_inference() for factor in factors)):
            weight: Tensor = _Composition.apply(self, *factors)
        return weight

    @weight.setter
    def weight(self, value: object) -> None:
        refuse_write(self, "layer.weight = ...")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in torch, but a ``RuntimeError`` for ``"weight"``."""
        if name == "weight":
            refuse_write(self, "layer.weight = ...")
        super().register_parameter(name, param)


def refuse_write(layer: HoldsFactors, operation: str) -> NoReturn:
    """Raise a ``RuntimeError`` that says what to do in the place of a write into the weight of a layer."""
    kind = type(layer).__name__
    names = ", ".join(name for name, _ in layer.named_parameters() if not name.endswith("bias"))
    raise RuntimeError(
        f"{operation} would write into the weight of a {kind}, which holds only its factors ({names}): what is written "
        "there would be lost. Write into the factors (set_factors_), or make the layer dense first: "
        "hf_fnl.merge_(model) for a model, also before an adapter is merged into it, or to_dense() of the layer. For "
        "values of your own, clone() the weight"
    )


class _Composition(torch.autograd.Function):
    """``W`` as a function of its factors, which are multiplied when it is read."""

    @staticmethod
    def forward(layer: HoldsFactors, *factors: Tensor) -> Tensor:
        return DenseWeight(layer, factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layer, *factors = inputs
        ctx.save_for_backward(*factors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pull_back = torch.func.vjp(ctx.layer.weight_from, *ctx.saved_tensors)[1]
        return None, *pull_back(*gradients)


class DenseWeight(Tensor):
    """The weight of a factorized layer, or a view of it, as a tensor that can only be read.

    It holds the factors. An operation that needs values multiplies them; shape, dtype and device cost nothing, and
    gradients reach the factors from whatever reads it. What would write into it, or into a view of it, raises a
    ``RuntimeError``: the layer would never see that. ``requires_grad_`` reaches the factors.

    Args:
        layer: The layer.
        factors: Its factors.
        values: Those of a view, which is of their shape.
    """

    _layer: HoldsFactors
    _factors: tuple[Tensor, ...]
    _view_values: Tensor | None
    _held: Tensor  # kept alive at the address that was asked for
    _is_detached: bool
    _is_hf_initialized: bool

    @staticmethod
    def __new__(cls, layer: HoldsFactors, factors: Sequence[Tensor], values: Tensor | None = None) -> Self:  # noqa: D102
        like = factors[0] if values is None else values
        shape = layer.dense_shape if values is None else values.shape
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        if values is not None:
            options |= {"strides": values.stride(), "storage_offset": values.storage_offset()}
        weight: Self = Tensor._make_wrapper_subclass(cls, shape, **options)
        weight._layer, weight._factors, weight._view_values = layer, tuple(factors), values
        weight._is_detached = values is not None
        weight._is_hf_initialized = True  # Transformers draws the factors, and passes by what is initialized
        return weight

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def read(self) -> Tensor:
        """Multiply the factors; returns an ordinary tensor without history, contiguous unless it is a view."""
        if self._view_values is not None:
            return self._view_values.detach()
        with torch.no_grad(), no_autocast(self.device):
            return self._layer.weight_from(*self._factors).contiguous()

    def _address(self) -> int:
        """Address of the values, one for all that hold this weight: by it PEFT tells whether layers are tied."""
        if self._view_values is not None:
            return self._view_values.data_ptr()
        factors = [(id(f), f.data_ptr(), 0 if f.is_inference() else f._version) for f in self._factors]
        with torch.no_grad(), no_autocast(self.device):
            values = self._layer.weight_from(*self._factors)  # its strides tell a matrix from its transpose
        self._held = _ADDRESSED.setdefault((*factors, values.shape, values.stride()), values.contiguous())
        return self._held.data_ptr()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what the dispatcher does not see: attributes that are set, and values that leave torch."""
        kwargs, weight = kwargs or {}, args[0] if args else None
        if isinstance(weight, DenseWeight):
            if func in _WRITES or (func in _WRITES_INTO_PARAMETERS and not weight._is_detached):
                refuse_write(weight._layer, _NAMES.get(func, getattr(func, "__name__", str(func))))
            if func in _REQUIRES_GRAD and not weight._is_detached:
                for factor in weight._factors:
                    factor.requires_grad_(*args[1:], **kwargs)
                return weight
            if func is Tensor.data_ptr:
                return weight._address()
            if func in _READS:
                result = func(weight.read().requires_grad_(weight.requires_grad), *args[1:], **kwargs)
                if func in _ARRAYS:
                    result.setflags(write=False)
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Multiply for what reads, and refuse what writes; views can only be read, either."""
        kwargs = kwargs or {}
        for weight in _written(func, args, kwargs):
            refuse_write(weight._layer, str(func))
        if func is torch.ops.aten.detach.default:
            detached = cls(args[0]._layer, args[0]._factors, args[0]._view_values)
            detached._is_detached = True
            return detached
        given, options = pytree.tree_map_only(DenseWeight, DenseWeight.read, (args, kwargs))
        result = func(*given, **options)
        if func._schema.is_mutable or all(returned.alias_info is None for returned in func._schema.returns):
            return result
        source = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, DenseWeight))
        return pytree.tree_map_only(Tensor, lambda view: cls(source._layer, source._factors, view), result)


_ADDRESSED: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


def _setter(name: str) -> Any:
    return getattr(Tensor, name).__set__


_REQUIRES_GRAD = {Tensor.requires_grad_, _setter("requires_grad")}
_ARRAYS: set[Any] = {Tensor.numpy, Tensor.__array__}
_READS = {*_ARRAYS, Tensor.__deepcopy__, Tensor.__format__, Tensor.__reduce_ex__, Tensor.__repr__, Tensor.tolist}
# What writes without the dispatcher, or hands out memory to be written.
_WRITES = {_setter("data"), Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.__dlpack__, Tensor.share_memory_}
_WRITES |= {Tensor.storage, Tensor.untyped_storage}
# What is kept with a parameter: here it would be kept with a tensor that the next access makes anew.
_WRITES_INTO_PARAMETERS = {_setter("grad"), Tensor.register_hook}
_NAMES = {_setter("data"): "weight.data = ...", _setter("grad"): "weight.grad = ..."}


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[DenseWeight]:
    """The weights among what an operation writes into."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, DenseWeight))
