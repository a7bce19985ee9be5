"""Outputs of finished blocks, cached on disk: a pass over data goes on where the last one ended.

Most models are chains of blocks, each of which is given what the one before it gave. Where the first ``n`` blocks of a
chain will not change any more, a pass needs their output only, not them: so all passes that visit one block after the
other cost about one pass through the model, in the memory of one batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fnl.surgery.padding import Batch

Run = Callable[[], Any]  # one pass of the model over one batch, and what it returns


@contextmanager
def replaced_forwards(modules: Iterable[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Call ``forward(module, own, ...)`` in place of the forwards of modules, ``own`` being what is replaced.

    Afterwards the modules have their own forwards again.
    """
    own = {module: module.__dict__.get("forward") for module in modules}
    for module in own:
        module.forward = functools.partial(forward, module, module.forward)
    try:
        yield
    finally:
        for module, before in own.items():
            del module.forward
            if before is not None:
                module.forward = before


@dataclass(eq=False)
class Chain:
    """Blocks that run one after the other.

    Args:
        blocks: The blocks in the order in which they run.
        finished: How many of the first blocks will not change any more.
        num_cached: How many of them are replaced by the cached output of the last of these.
    """

    blocks: tuple[nn.Module, ...]
    finished: int = 0
    num_cached: int = 0


@dataclass
class BlockOutputCache:
    """Cache of the outputs of finished blocks, which are replayed in their places.

    Args:
        model: Any model; its lists of modules are taken for chains where :meth:`find_chains` finds that they are.
        folder: Where outputs are kept.
    """

    model: nn.Module
    folder: Path
    chains: list[Chain] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer: list[nn.Module] = []
        blocks: list[tuple[nn.Module, ...]] = []
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList | nn.Sequential):
                is_inner = any(_holds(each, module) for each in outer)
                outer += [] if is_inner else [module]
                # Blocks of a stage, as Swin has them, are of one class and no single layers, as parts of a block are.
                are_blocks = len({type(each) for each in module}) == 1 and all(any(each.children()) for each in module)
                blocks += [tuple(module.children())] if are_blocks or not is_inner else []
        repeated = {b for each in blocks for b in each if sum(b in others for others in blocks) > 1}
        self._possible = [Chain(each) for each in blocks if not repeated & set(each) and len(set(each)) == len(each)]
        self._places = {block: (chain, i) for chain in self._possible for i, block in enumerate(chain.blocks)}
        self._batch_index = 0
        self._num_batches = 0
        self._written: dict[Chain, int] = {}
        self._observe: Callable[[Chain, int, Any, Any, Run], Any] | None = None

    def replacing_forwards(self) -> AbstractContextManager[None]:
        """Run :meth:`_forward` in place of the blocks' own forwards, which are back afterwards."""
        return replaced_forwards(self._places, self._forward)

    def block_of(self, module: nn.Module) -> nn.Module | None:
        """Return the innermost block of a chain that holds a module, ``None`` if none does."""
        blocks = (block for chain in reversed(self.chains) for block in chain.blocks)
        return next((block for block in blocks if _holds(block, module)), None)

    def find_chains(self, run: Run) -> None:
        """Find the lists whose blocks run once each, in order, each given exactly what the one before it gave.

        Nothing else may use what a block gave, but for the last one of a list, nor may it leave anything in what it was
        given, as Gemma 3n's do for those that share their keys. It is found out by two passes: one in which all run,
        and one for each list in which its blocks, but for the last, answer with NaN: none of it may
        arrive anywhere but in the block that comes next.
        """
        called: dict[Chain, list[int]] = {}
        outputs: dict[tuple[Chain, int], Any] = {}
        last: dict[Chain, list[Tensor]] = {}

        def note(chain: Chain, index: int, args: Any, kwargs: Any, forward: Run) -> Any:
            is_next = index == 0 or any(x is y for x in tensors_in((args, kwargs)) for y in last.get(chain, ()))
            given = [*map(id, tensors_in((args, kwargs)))]
            output = forward()
            is_next &= given == [*map(id, tensors_in((args, kwargs)))]  # it leaves nothing behind in what all share
            called.setdefault(chain, []).append(index if is_next else -1)
            last[chain] = list(tensors_in(output))
            is_last = index == len(chain.blocks) - 1
            outputs[chain, index] = output if is_last else _mapped(output, lambda x: _NaN(x.shape, x.dtype, x.device))
            return output

        with self._observed(note):
            run()
        for chain in self._possible:
            is_once = called.get(chain) == list(range(len(chain.blocks))) and len(chain.blocks) > 1
            if is_once and self._is_chain(chain, outputs, run):
                self.chains.append(chain)

    def _is_chain(self, chain: Chain, outputs: Mapping[tuple[Chain, int], Any], run: Run) -> bool:
        given: list[Tensor] = []
        leaks = False

        def answer(other: Chain, index: int, args: Any, kwargs: Any, forward: Run) -> Any:
            nonlocal given, leaks
            arrived = [x for x in tensors_in((args, kwargs)) if _has_nan(x)]
            if other is not chain:
                leaks |= len(arrived) > 0
                return forward()
            leaks |= any(all(x is not y for y in given) for x in arrived) or (index > 0 and not arrived)
            output = _mapped(outputs[chain, index], lambda x: x.filled() if isinstance(x, _NaN) else x)
            given = list(tensors_in(output))
            leaks |= any(not x.is_floating_point() for x in given)
            return output

        with self._observed(answer):
            try:
                result = run()
            except (ArithmeticError, IndexError, RuntimeError, ValueError):  # of a model that refuses NaN
                return False
        return not leaks and not any(map(_has_nan, tensors_in(result)))

    @contextmanager
    def _observed(self, observe: Callable[[Chain, int, Any, Any, Run], Any]) -> Iterator[None]:
        self._observe = observe
        try:
            yield
        finally:
            self._observe = None

    @contextmanager
    def passes(self, unfinished: Callable[[nn.Module], bool]) -> Iterator[None]:
        """Make ready for passes over all batches, after which the outputs of more blocks are cached.

        Args:
            unfinished: Tells of a block whether it will still change.
        """
        for chain in self.chains:
            changing = (i for i, block in enumerate(chain.blocks) if unfinished(block))
            chain.finished = next(changing, len(chain.blocks))
        self._written = dict.fromkeys(self.chains, 0)
        self._num_batches = 0
        yield
        for chain, written in self._written.items():
            if written == self._num_batches and chain.finished > chain.num_cached:
                chain.num_cached = chain.finished

    def begin(self, batch: int) -> None:
        """Begin a pass over the batch of a number; inside :meth:`passes`."""
        self._batch_index = batch
        self._num_batches += 1

    def _forward(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        chain, index = self._places[block]
        run = functools.partial(forward, *args, **kwargs)
        if self._observe is not None:
            return self._observe(chain, index, args, kwargs, run)
        file = self.folder / f"{self._possible.index(chain)}-{self._batch_index}.pt"
        if index < chain.num_cached:
            return torch.load(file, weights_only=False)
        output = run()
        if chain in self._written and index == chain.finished - 1:
            torch.save(output, file)
            self._written[chain] += 1
        return output


class _NaN:
    """Stands for a tensor of NaN."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._like = shape, dtype, device

    def filled(self) -> Tensor:
        shape, dtype, device = self._like
        return torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)


def _holds(outer: nn.Module, module: nn.Module) -> bool:
    return any(each is module for each in outer.modules())


def _mapped(value: Any, by: Callable[[Any], Any]) -> Any:
    """Return a module's output with every tensor, or what stands for one, mapped."""
    if isinstance(value, Tensor | _NaN):
        return by(value)
    if isinstance(value, Mapping):
        mapped = {key: _mapped(each, by) for key, each in value.items()}
        return mapped if type(value) is dict else type(value)(**mapped)
    if isinstance(value, tuple | list):
        items = [_mapped(each, by) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def run_over(model: nn.Module, batch: Batch) -> Any:
    """Run a model over a batch, without a cache, and return what it returns."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
    parameters = inspect.signature(model.forward).parameters  # of a module around the model, maybe
    takes_it = "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if takes_it and hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    return model(**inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in what a module is given or returns, also in mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)


def _has_nan(x: Tensor) -> bool:
    return x.is_floating_point() and bool(x.isnan().any())
