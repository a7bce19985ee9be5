"""Making a model without values while its random numbers are drawn and what sets its parameters is noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers import initialization as init

# Functions of torch.nn.init that do nothing to a tensor on the meta device, and so draw nothing for it.
_SKIPPING_META = ("trunc_normal_", "orthogonal_", "sparse_", "dirac_")


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def meta_parameters(keep: Callable[[nn.Parameter, Tensor], object] | None = None) -> Iterator[None]:
    """Modules made here have their parameters on the meta device; buffers are computed.

    Args:
        keep: Is told each parameter, and the tensor that it was to be.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            value = parameter.detach()
            if not value.is_meta:
                parameter = nn.Parameter(value.to("meta"), requires_grad=parameter.requires_grad)
            if keep is not None:
                keep(parameter, value)
        register(module, name, parameter)

    with _replaced(nn.Module, "register_parameter", register_on_meta):
        yield


class MetaWrites(TorchDispatchMode):
    """Notes what is written to tensors on the meta device, and moves the random stream on as if they had values.

    Attributes:
        initial: Values that parameters were made from, where that was more than empty memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.initial: dict[nn.Parameter, Tensor] = {}
        self._parameters: dict[int, tuple[nn.Parameter, UntypedStorage]] = {}
        self._written: set[int] = set()
        self._empty: set[StorageWeakRef] = set()

    def keep(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Know a parameter on the meta device, and the value that it was made from."""
        storage = parameter.untyped_storage()  # kept, so that its address is not used again
        self._parameters.setdefault(storage._cdata, (parameter, storage))
        if not value.is_meta and StorageWeakRef(value.untyped_storage()) not in self._empty:
            self.initial[parameter] = value

    def take_written(self) -> set[nn.Parameter]:
        """The parameters that were written to since the last call."""
        written = {self._parameters[address][0] for address in self._written if address in self._parameters}
        self._written = set()
        return written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if isinstance(target, Tensor) and target.is_meta and func._schema.is_mutable:
            self._written.add(target.untyped_storage()._cdata)
            if torch.Tag.nondeterministic_seeded in func.tags:
                func(_empty_like(target), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if func is torch.ops.aten.empty.memory_format:
            self._empty.add(StorageWeakRef(result.untyped_storage()))
        return result


def _empty_like(tensor: Tensor) -> Tensor:
    """Memory on the CPU in the layout of a tensor on the meta device, which decides how much is drawn."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _drawing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def draw(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not tensor.is_meta:
            return function(tensor, *args, **kwargs)
        function(_empty_like(tensor), *args, **kwargs)
        with torch.no_grad():
            return tensor.zero_()  # notes that it is written

    return draw


@contextmanager
def drawing_on_meta() -> Iterator[None]:
    """Let the functions that skip the meta device draw for it, too."""
    functions = {name: _drawing(init.TORCH_INIT_FUNCTIONS[name]) for name in _SKIPPING_META}
    with ExitStack() as stack:
        stack.enter_context(_replaced(init, "TORCH_INIT_FUNCTIONS", init.TORCH_INIT_FUNCTIONS | functions))
        for name, function in functions.items():
            stack.enter_context(_replaced(nn.init, name, function))
        yield


@dataclass(frozen=True)
class Event:
    """One call of ``owner._init_weights(module)``.

    Args:
        number: Calls before it.
        owner: The model, or the one inside it, that initializes the module.
        module: The module.
        state: Where the random stream was.
        written: The parameters that were set.
    """

    number: int
    owner: PreTrainedModel
    module: nn.Module
    state: Tensor
    written: set[nn.Parameter]


def record(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, list[Event], dict[nn.Parameter, Tensor]]:
    """Make a model whose parameters are on the meta device, and note what sets them.

    Random numbers are drawn and dropped: the stream is afterwards where it is if the model is made as usual.

    Args:
        make: Makes it.

    Returns:
        The model, whose buffers have values; the calls that set its parameters; and the values before these calls of
        those parameters that have any.
    """
    writes, events = MetaWrites(), list[Event]()
    initialize = PreTrainedModel._initialize_weights

    def initialize_and_note(owner: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        state = torch.get_rng_state()
        writes.take_written()
        initialize(owner, module, is_custom_code)
        if written := writes.take_written():
            events.append(Event(len(events), owner, module, state, written))

    noting = _replaced(PreTrainedModel, "_initialize_weights", initialize_and_note)
    with meta_parameters(writes.keep), drawing_on_meta(), noting, writes:
        return make(), events, writes.initial
