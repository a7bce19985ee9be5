"""Truncation while data run through a model: every block is replaced when the data have reached it.

Batches run one at a time, and what is measured adds up over them. Layers are visited in the order of execution, those
of one block together; what a block is given comes from blocks that are replaced already. Layers that are given the same
tensor, as queries, keys and values are, share its moments; those of one block are in memory at a time. What blocks gave
that are done is kept on disk (:mod:`hf_fnl.surgery.blocks`), so that all visits together cost a few passes over the
data. Heads are measured as they run, and what comes after them in their block when they are replaced.

A layer that a pass calls several times, as those that ALBERT shares between its depths, sees at all its calls what the
layers replaced so far give, itself not among them.

Padding is cut away; see :mod:`hf_fnl.surgery.padding`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_fnl.math.truncation import Moments
from hf_fnl.surgery.blocks import BlockOutputCache, replaced_forwards, run_over
from hf_fnl.surgery.calibration_data import CalibrationData, evaluating
from hf_fnl.surgery.measure import HeadMomentsRequest, Measured, Request, head_moments, query_grams, samples
from hf_fnl.surgery.padding import Batch, unpadded
from hf_fnl.surgery.sensitivity import Probe, num_positions
from hf_fnl.utils.suggest import listed

# Gets a name and what was measured there; returns the module whose forward runs from then on, or several by those in
# whose places they run, which may lie inside of it; ``None`` for the module itself.
Handler: TypeAlias = Callable[[str, Any], nn.Module | Mapping[nn.Module, nn.Module] | None]
Ties: TypeAlias = Mapping[str, Sequence[str]]
# The name of a module that is called, whether it is given what the last one was given, and the shape of that.
Call: TypeAlias = tuple[str, bool, torch.Size]

ENOUGH = 16  # vectors for each direction they lie in: more of them hardly move a spectrum


@torch.no_grad()
def visit_modules(
    model: nn.Module,
    requests: Mapping[str, Request],
    handle: Handler,
    data: CalibrationData | None,
    ties: Ties | None = None,
    *,
    changes: bool = True,
) -> None:
    """Handle modules of a model by name: one after the other, or, given data, when these have reached their block.

    The model itself stays as it is: what a handler returns runs in its place in these passes only. Dropout is off.

    Args:
        model: Any model; called with each batch as keyword arguments.
        requests: What to measure at each module that is named.
        handle: Gets a name and, where there are data, what was asked for, in the order of execution.
        data: Inputs of the model, which run one batch after the other, several times.
        ties: Names of other modules whose calls count as calls of one that is named, for they hold its weight.
        changes: Whether the handler returns modules. Where it only looks, a block need not run again, and of many
            batches a part is enough: 16 vectors for each direction in front of every module.

    Raises:
        ValueError: If no token reaches a module that is named, or a mask hides positions between others.

    Warns:
        UserWarning: If fewer vectors reach a module than they are wide.
    """
    ties = ties or {}
    if data is None:
        for name in requests:
            handle(name, None)
        return
    felt = data.sensitivities(_probes(model, requests, ties))

    def handle_with_sensitivity(name: str, measured: Any) -> Any:
        found = {"sensitivity": felt.get(name), "query_gradient": felt.get(f"{name} queries")}
        known = {key: value for key, value in found.items() if value is not None}
        return handle(name, replace(measured, **known) if known else measured)

    batches = [part for batch in data.batches for part in unpadded(model, batch)]
    with evaluating(model), tempfile.TemporaryDirectory(prefix="hf_fnl-") as folder:
        cache = BlockOutputCache(model, Path(folder))
        visits = _Visits(model, batches, requests, handle_with_sensitivity, ties, cache, changes)
        with visits.replacing_forwards(), visits.cache.replacing_forwards():
            visits.run()
    visits.warn_of_few()


def _probes(model: nn.Module, requests: Mapping[str, Request], ties: Ties) -> dict[str, Probe]:
    """Where gradients are looked at: outputs of layers and attentions, and queries, head by head."""
    probes: dict[str, Probe] = {}
    for name, request in requests.items():
        if request == "inputs":
            probes[name] = Probe([model.get_submodule(each) for each in (name, *ties.get(name, ()))])
        elif isinstance(request, HeadMomentsRequest):
            if request.output is not None:
                probes[name] = Probe([request.output])
            if request.query is not None:
                probes[f"{name} queries"] = Probe([request.query.layer], functools.partial(query_grams, request))
    return probes


class _Reached(Exception):
    """Ends a pass of which nothing more is needed."""


@dataclass
class _Visits:
    """The modules that are handled, over as many passes as it takes."""

    model: nn.Module
    batches: Sequence[Batch]
    requests: Mapping[str, Request]
    handle: Handler
    ties: Ties
    cache: BlockOutputCache
    changes: bool
    handled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.modules = {name: self.model.get_submodule(name) for name in self.requests}
        self.names = {module: name for name, module in self.modules.items()}
        self.names |= {
            self.model.get_submodule(tied): name for name in self.modules for tied in self.ties.get(name, ())
        }
        self.replacements: dict[nn.Module, nn.Module] = {}
        self.traced: list[Call] | None = None
        self.given: Any = None  # to the last call
        self.stage: Sequence[str] = ()  # what is visited now
        self.measured: dict[str, Any] = {}  # of these
        self.remaining: Counter[str] | None = None  # calls of these that the pass still has to see, where it ends then
        self.later: set[str] = set()  # what is visited afterwards; where nothing changes a pass ends in front of it
        self.shared: Moments | None = None  # of what was given to the last call
        self.is_inside = False  # of an attention that is measured
        self.few: dict[str, str] = {}  # how many vectors reached these, where that is fewer than they are wide

    def run(self) -> None:
        """Visit all modules."""
        stages = self._stages()
        total = sum(self.requests[stage[0]] is not None for stage, _ in stages) * len(self.batches)
        with logging.tqdm(total=total, desc="calibrating", unit="batch", delay=5) as progress:
            for self.stage, is_once in stages:
                if self.requests[self.stage[0]] is not None:
                    self._measure_stage(is_once, progress)
                for name in self.stage:
                    self._handle(name, self.measured.pop(name, None))

    def _stages(self) -> list[tuple[list[str], bool]]:
        """Modules that are visited together, in the order of execution, and whether a pass calls them once."""
        order: list[str] = []
        joining: set[str] = set()  # modules that are given what the one before them in the order is given
        counts: Counter[str] = Counter()
        # Vectors that reached what is measured, for each direction that they lie in.
        vectors = {name: 0.0 for name, request in self.requests.items() if request is not None}
        for number in range(len(self.batches)):
            before: str | None = None
            trace = self._trace(number)
            for name, shares, shape in trace:
                if name not in order:
                    order.insert(0 if before is None else order.index(before) + 1, name)
                    if shares and self.requests[name] == "inputs" == self.requests[before or name]:
                        joining.add(name)
                before = name
                if name in vectors and shape:
                    vectors[name] += shape[:-1].numel() / shape[-1]
            counts |= Counter(name for name, *_ in trace)
            if len(order) == len(self.requests):
                if not self.changes and vectors:
                    self._keep_enough(number + 1, min(vectors.values()))
                break
        if missed := [name for name in self.requests if name not in order]:
            raise ValueError(self._complaint(missed))
        stages: list[tuple[list[str], bool]] = []
        for name in order:
            is_once = counts[name] == 1
            if is_once and stages and stages[-1][1] and (name in joining or self._share_a_pass(stages[-1][0][0], name)):
                stages[-1][0].append(name)
            else:
                stages.append(([name], is_once))
        return stages

    def _keep_enough(self, count: int, found: float) -> None:
        """Leave batches out, evenly, of which the first ones make so many vectors for each direction."""
        positions = [num_positions(batch) for batch in self.batches]
        needed = ENOUGH * sum(positions[:count]) / found if found else math.inf
        kept = math.ceil(len(positions) * min(1.0, needed / sum(positions)))
        places = {*range(count), *(i * len(positions) // kept for i in range(kept))}
        self.batches = [self.batches[place] for place in sorted(places)]

    def _share_a_pass(self, first: str, name: str) -> bool:
        """Whether two modules are measured in one pass: layers that are in one block."""
        if not self.requests[first] == "inputs" == self.requests[name]:
            return False
        block = self.cache.block_of(self.modules[first])
        return block is not None and self.cache.block_of(self.modules[name]) is block

    def _trace(self, number: int) -> list[Call]:
        """Calls of a whole pass; the first one also finds the chains of blocks."""
        traces: list[list[Call]] = []

        def run() -> Any:
            self.traced, self.given = [], None
            output = run_over(self.model, self.batches[number])
            traces.append(self.traced)
            return output

        if number == 0:
            self.cache.find_chains(run)
        else:
            run()
        self.traced, self.given = None, None
        return traces[0]

    def _measure_stage(self, is_once: bool, progress: Any) -> None:
        unfinished = {name for name in self.requests if name not in self.handled}
        if not self.changes:
            unfinished -= {*self.stage}
        self.later = unfinished - {*self.stage}
        pending = {module for module, name in self.names.items() if name in unfinished}
        with self.cache.passes(lambda block: not pending.isdisjoint(block.modules())):
            for number in range(len(self.batches)):
                self.remaining = Counter(self.stage) if is_once else None
                self.cache.begin(number)
                with contextlib.suppress(_Reached):
                    run_over(self.model, self.batches[number])
                self.given, self.shared = None, None
                progress.update()
        if missed := [name for name in self.stage if name not in self.measured]:
            raise ValueError(self._complaint(missed))

    def _complaint(self, missed: Sequence[str]) -> str:
        return (
            f"the calibration data never reach {listed(missed, 8)}; no token was routed there, or inputs are missing: "
            "leave it out, or give more data"
        )

    def _handle(self, name: str, measured: Measured) -> None:
        module, new = self.modules[name], self.handle(name, measured)
        self.replacements.update({module: new} if isinstance(new, nn.Module) else new or {})
        self.handled.add(name)
        several = () if measured is None else vars(measured).values()
        for moments in (measured,) if isinstance(measured, Moments) else several:
            if isinstance(moments, Moments) and moments.count < (width := moments.mean.shape[-1]):
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

    def _forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = self.names[module]
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, Tensor) and given.numel() == 0:
            return forward(*args, **kwargs)  # an expert without tokens
        if self.traced is not None:
            shape = given.shape if isinstance(given, Tensor) else torch.Size()
            self.traced.append((name, given is self.given, shape))
            self.given = given
        elif name in self.later and self.remaining == Counter() and not self.is_inside:
            raise _Reached
        elif name in self.stage and name not in self.handled and not self.is_inside:
            self._measure(name, given, functools.partial(forward, *args, **kwargs))
        new = self.replacements.get(module) if name in self.handled else None
        return forward(*args, **kwargs) if new is None else new(*args, **kwargs)

    def _measure(self, name: str, given: Any, call: Callable[[], Any]) -> None:
        """Add what one call of a module shows; ends the pass after the last call."""
        request = self.requests[name]
        try:
            measured: Measured
            if not isinstance(request, HeadMomentsRequest):
                measured = self.shared if given is self.given else Moments.of(samples(given))
                self.given, self.shared = given, measured
            else:
                self.is_inside = True
                measured = head_moments(request, call)
                self.is_inside = False
        except ValueError as error:
            raise ValueError(f"what reaches {name} cannot be used: {error}") from error
        if measured is not None:
            self.measured[name] = self.measured[name].joined(measured) if name in self.measured else measured
        if self.remaining is not None:
            self.remaining -= Counter([name])
            if not self.remaining and (self.changes or not self.later):
                raise _Reached

    def replacing_forwards(self) -> AbstractContextManager[None]:
        """Run :meth:`_forward` in place of the modules' own forwards, which are back afterwards."""
        return replaced_forwards(self.names, self._forward)
