"""Training steps of models side by side: their operations, tokens and memory beside their times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness.limits import count_flops, matrix_rate
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.timing import Case, Comparison, Goal, Row

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """A model that takes part in a comparison.

    Attributes:
        model: On its device, in the mode in which it is timed.
        compiled: Whether ``torch.compile`` makes one graph of it.
        share_of_limit: What it is to reach of the speed that its operations would allow.
        utilisation: What it is to reach of the device's rate of matrix products.
    """

    model: PreTrainedModel
    compiled: bool = False
    share_of_limit: float | None = None
    utilisation: float | None = None


@dataclass(frozen=True)
class Steps:
    """Forward and backward passes of several models on the same batches, one for each round.

    Args:
        workload: What they do.
        batches: At least as many as there are rounds, so that no model sees a batch twice.
        tokens: In a batch.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: Of autocast; none for float32.
        loss: Of a model's output.
        goals: Times that are to be reached, by name.
    """

    workload: str
    batches: Sequence[Batch]
    tokens: int
    device: str
    dtype: torch.dtype | None = None
    loss: Callable[[Any], Tensor] = lambda output: output.loss
    goals: Mapping[str, Goal] = field(default_factory=dict)

    def case(self, contender: Contender) -> Case:
        """One step, on the next batch each time."""
        model, upcoming = contender.model, cycle(self.batches)
        forward = torch.compile(model, fullgraph=True) if contender.compiled else model

        def step() -> None:
            model.zero_grad()
            with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
                loss = self.loss(forward(**next(upcoming)))
            loss.backward()

        return step

    def flops(self, model: PreTrainedModel) -> int:
        """Of a step; on a CPU the fused kernel of attention would not be counted."""
        kernel = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            return count_flops(self.case(Contender(model)))
        finally:
            model.set_attn_implementation(kernel)

    def measure(self, contenders: Mapping[str, Contender], against: str, *, rounds: int) -> Iterator[Row]:
        """A row for each, and the reason in the place of figures where one cannot run here."""
        cases: dict[str, Case] = {}
        for name, contender in contenders.items():
            case = self.case(contender)
            try:
                case()
            except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException, ImportError) as error:
                reason = str(error).strip().partition("\n")[0][:200]
                yield {"workload": self.workload, "case": name, "not_measured": f"{type(error).__name__}: {reason}"}
                contender.model.zero_grad()
            else:
                cases[name] = case
        flops = {name: self.flops(contenders[name].model) for name in cases}
        facts = {name: self._facts(contenders[name], cases[name], flops[name]) for name in cases}
        if against not in cases:
            against = next(iter(cases))
        comparison = Comparison(
            self.workload,
            cases,
            against,
            limits={name: flops[against] / flops[name] for name in cases},
            goals={name: goal for name, goal in self.goals.items() if name in cases and goal.against in cases},
            facts=facts,
        )
        rate = matrix_rate(self.device, self.dtype or torch.float32)
        for row in comparison.measure(self.device, rounds=rounds):
            seconds = row["milliseconds"] / 1e3
            row["tokens_per_second"] = self.tokens / seconds
            row["flop_utilisation"] = flops[row["case"]] / (seconds * rate)
            yield _judged(row, contenders[row["case"]])

    def _facts(self, contender: Contender, case: Case, flops: int) -> Row:
        model = contender.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts: Row = {"trained_parameters": trained, "gigaflops": flops / 1e9}
        if self.device == "cuda" or not contender.compiled:  # a CPU's count looks at every operation by itself
            model.zero_grad()
            facts["peak_megabytes"] = peak_bytes(case, list(model.parameters())) / 2**20
        model.zero_grad()
        return facts


def _judged(row: Row, contender: Contender) -> Row:
    """With the goals that are no times."""
    for key, least in (("share_of_limit", contender.share_of_limit), ("flop_utilisation", contender.utilisation)):
        if least is not None:
            row |= {"goal": f"{key.replace('_', ' ')} at least {least:g}", "reached": row[key] >= least}
    return row


def check_close(name: str, actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float) -> None:
    """Raise a ``RuntimeError`` unless tensors are close, relative to the largest element of each that is expected."""
    for ours, theirs in zip(actual, expected, strict=True):
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if not error < tolerance:
            raise RuntimeError(f"{name}: {error:.1e} from what it should be; nothing was timed")
