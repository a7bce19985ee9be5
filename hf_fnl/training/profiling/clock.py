"""Time by phase, without a gap and without an overlap."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

REST = "rest"
Now = Callable[[], Any]
Elapsed = Callable[[Any, Any], float]


class Clock:
    """Gives every moment of some steps to one phase, the innermost that runs, so that phases add up to the steps.

    On a GPU the boundaries are CUDA events in the stream of the work: nothing waits for the device until :meth:`stop`,
    and a phase is as long as the device was busy with it or waited for it. Elsewhere they are times of the processor.

    Args:
        device: Where the work runs.
        now: Marks a moment; chosen by the device unless given.
        elapsed: Seconds between two such marks.
    """

    def __init__(self, device: torch.device, *, now: Now | None = None, elapsed: Elapsed | None = None) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._now: Now = now or (_event if on_gpu else time.perf_counter)
        self._elapsed: Elapsed = elapsed or (_between_events if on_gpu else _between)
        self._open: list[tuple[str, bool]] = []  # phases that run, and whether what is inside belongs to them
        self._boundaries: list[tuple[Any, str]] = []  # when which phase begins
        self._ends: list[int] = []  # of steps: how many boundaries lie before

    @property
    def runs(self) -> bool:
        """Whether it was started and not stopped."""
        return bool(self._open)

    def start(self) -> None:
        """Begin with the first step, in :data:`REST`."""
        _wait_for(self._device)
        self._open, self._boundaries, self._ends = [(REST, False)], [], []
        self._begin(REST)

    @contextmanager
    def phase(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """What runs inside belongs to a phase, except phases inside of it.

        Args:
            name: Of the phase.
            whole: Phases inside belong to it, too.
        """
        if not self._open or self._open[-1][1]:
            yield
            return
        self._open.append((name, whole))
        self._begin(name)
        try:
            yield
        finally:
            self._open.pop()
            self._begin(self._open[-1][0])

    def mark(self) -> Any:
        """This moment, for :meth:`since`."""
        return self._now()

    def since(self, mark: Any, name: str) -> None:
        """Give the time from a mark until the next boundary to a phase; no boundary may lie between."""
        self._boundaries.append((mark, name))

    def end_step(self) -> None:
        """A step ends and the next one begins."""
        self._begin(self._open[-1][0])
        self._ends.append(len(self._boundaries) - 1)

    def stop(self) -> list[dict[str, float]]:
        """End; what came after the last end of a step is dropped.

        Returns:
            The seconds of every phase, for each step.
        """
        _wait_for(self._device)
        self._open = []
        starts = [0, *self._ends]
        return [self._sum(first, last) for first, last in zip(starts, self._ends, strict=False)]

    def _begin(self, name: str) -> None:
        self._boundaries.append((self._now(), name))

    def _sum(self, first: int, last: int) -> dict[str, float]:
        seconds: defaultdict[str, float] = defaultdict(float)
        for (mark, name), (following, _) in zip(
            self._boundaries[first:last], self._boundaries[first + 1 : last + 1], strict=True
        ):
            seconds[name] += self._elapsed(mark, following)
        return dict(seconds)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_events(first: Any, second: Any) -> float:
    return first.elapsed_time(second) / 1e3


def _between(first: float, second: float) -> float:
    return second - first


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
