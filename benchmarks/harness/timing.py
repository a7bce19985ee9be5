"""Cases timed in turns, and what the times say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from hf_fnl.training.command_line import tracked

Case = Callable[[], object]
Row = dict[str, Any]
Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Goal:
    """What a case is to reach beside another one: its time as a multiple, or how many times faster it is.

    Args:
        against: Name of the other case.
        faster: At least so many times as fast.
        slower: At most so many times the time; one of both is given.
    """

    against: str
    faster: float | None = None
    slower: float | None = None

    def reached(self, seconds: Seconds, case: str) -> bool:
        """Whether the median over the rounds does."""
        found = ratio(seconds[case], seconds[self.against])
        return found <= (self.slower if self.slower is not None else 1 / self.faster)  # type: ignore[operator]

    def __str__(self) -> str:
        if self.slower is not None:
            return f"at most {self.slower:g} times {self.against}"
        return f"{self.faster:g} times as fast as {self.against}"


@dataclass(frozen=True)
class Comparison:
    """Cases that do the same work, timed side by side.

    Args:
        workload: What they do.
        cases: What to time, by name; the first call of each is never timed.
        against: Name of the case that the others are compared with.
        limits: How many times as fast as ``against`` a case can be, by its operations or bytes.
        goals: What a case is to reach.
        facts: Other columns of the case's row, such as its parameters or its peak memory.
    """

    workload: str
    cases: Mapping[str, Case]
    against: str
    limits: Mapping[str, float] = field(default_factory=dict)
    goals: Mapping[str, Goal] = field(default_factory=dict)
    facts: Mapping[str, Row] = field(default_factory=dict)

    def measure(self, device: str, *, rounds: int, warmup: int = 2) -> list[Row]:
        """A row for every case: median and quartiles in milliseconds, and medians of ratios within the rounds."""
        seconds = interleave(self.cases, device, rounds=rounds, warmup=warmup)
        return [self._row(name, seconds) for name in self.cases]

    def _row(self, name: str, seconds: Seconds) -> Row:
        lower, middle, upper = (1e3 * quartile for quartile in quantiles(seconds[name], n=4))
        speedup = ratio(seconds[self.against], seconds[name])
        limit, goal = self.limits.get(name), self.goals.get(name)
        return {
            "workload": self.workload,
            "case": name,
            "milliseconds": middle,
            "quartiles": f"{lower:.3g}-{upper:.3g}",
            "speedup": speedup,
            "limit": limit,
            "share_of_limit": None if limit is None else speedup / limit,
            "goal": None if goal is None else str(goal),
            "reached": None if goal is None else goal.reached(seconds, name),
            **self.facts.get(name, {}),
        }


def interleave(cases: Mapping[str, Case], device: str, *, rounds: int, warmup: int = 2) -> Seconds:
    """Time cases side by side: every round runs each case once, beginning with another one each time.

    Whatever slows the machine for a while then slows all cases, so ratios within a round are steadier than times.

    Args:
        cases: What to time, by name.
        device: Where they run. A GPU's own clock (CUDA events) times what it does.
        rounds: Rounds that are timed.
        warmup: Rounds before them that are not.

    Returns:
        The seconds of every case, one for each timed round.
    """
    names = list(cases)
    timed = _on_gpu if torch.device(device).type == "cuda" else _on_cpu
    seconds: Seconds = {name: [] for name in names}
    for turn in tracked(range(warmup + rounds), f"timing {len(names)} cases"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = timed(cases[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Median over the rounds of the time of a case by that of another."""
    return median(a / b for a, b in zip(seconds, reference, strict=True))


def _on_cpu(case: Case) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def _on_gpu(case: Case) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    case()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
