"""What a profile of training steps found, and what a person makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from hf_fnl.training.profiling.clock import REST
from hf_fnl.training.profiling.phases import ASIDE, BACKWARD, COMMUNICATION, DATA, DECAY, FORWARD, OPTIMIZER

PHASES = (DATA, FORWARD, BACKWARD, DECAY, OPTIMIZER, COMMUNICATION, ASIDE, REST)

# Shares of a step from which on something is worth a word; below a share of the matrix rate there is something to gain.
_MUCH_DATA, _MUCH_DECAY, _MUCH_OPTIMIZER, _MUCH_COMMUNICATION, _MUCH_REST = 0.1, 0.1, 0.2, 0.15, 0.1
_MUCH_PADDING, _LITTLE_USE = 0.2, 0.35


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What of a run's settings a hint may be about.

    Args:
        dtype: Of the matrix products, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: Where it runs, as torch calls it.
        compiled: Whether the model is compiled.
        workers: Processes that prepare data.
        accumulation: Forward passes of a step.
        processes: Processes of the run.
        optim: The optimizer.
        penalty: Whether Frobenius decay is a part of the loss.
    """

    dtype: str
    device: str
    compiled: bool = False
    workers: int = 0
    accumulation: int = 1
    processes: int = 1
    optim: str = "flambe"
    penalty: bool = False


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Means over the steps that were looked at, in the first process.

    Args:
        settings: The run.
        steps: Seconds of each phase, for every step.
        items: Tokens, or images, of a step in all forward passes of this process.
        unit: What ``items`` counts.
        padding: Share of the tokens that is padding, where there are masks.
        flops: Operations of the forward and the backward pass of a step, activations that are computed again left out;
            ``None`` if they could not be counted.
        rate: Operations a second that the device was measured to do in products of matrices.
        peak_memory: Bytes: on a GPU of the tensors in these steps, else of the process so far.
        note: What else is to be said, for example why nothing was counted.
    """

    settings: Settings
    steps: Sequence[dict[str, float]]
    items: float
    unit: str = "tokens"
    padding: float | None = None
    flops: dict[str, float] | None = None
    rate: float | None = None
    peak_memory: int | None = None
    note: str = ""

    @property
    def phases(self) -> dict[str, float]:
        """Mean seconds of every phase of a step, those without any left out."""
        found = {name: mean(step.get(name, 0.0) for step in self.steps) for name in PHASES}
        return {name: seconds for name, seconds in found.items() if seconds or name != ASIDE}

    @property
    def seconds(self) -> float:
        """Mean seconds of a step."""
        return mean(sum(step.values()) for step in self.steps)

    @property
    def utilisation(self) -> float | None:
        """Share of the measured matrix rate that a step reaches."""
        if self.flops is None or self.rate is None:
            return None
        return sum(self.flops.values()) / self.seconds / self.rate

    def share(self, phase: str) -> float:
        """Of a step."""
        return self.phases.get(phase, 0.0) / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, as JSON holds it."""
        return {
            "settings": asdict(self.settings),
            "steps": len(self.steps),
            "seconds_per_step": self.seconds,
            "seconds_of_steps": [sum(step.values()) for step in self.steps],
            "phases": self.phases,
            f"{self.unit}_per_second": self.items / self.seconds,
            "padding": self.padding,
            "flops_per_step": self.flops,
            "matrix_rate": self.rate,
            "flop_utilisation": self.utilisation,
            "peak_memory_bytes": self.peak_memory,
            "advice": self.advice(),
            "note": self.note,
        }

    def rows(self) -> list[tuple[str, str, str]]:
        """A line for every phase: its name, milliseconds, and share of the step; the step last."""
        lines = [(name, f"{1e3 * seconds:,.2f}", f"{self.share(name):.1%}") for name, seconds in self.phases.items()]
        return [*lines, ("step", f"{1e3 * self.seconds:,.2f}", "100.0%")]

    def facts(self) -> list[str]:
        """The figures that are no times."""
        lines = [f"{self.items / self.seconds:,.0f} {self.unit}/s in each of {self.settings.processes} processes"]
        if self.settings.processes == 1:
            lines = [f"{self.items / self.seconds:,.0f} {self.unit}/s"]
        times = [1e3 * sum(step.values()) for step in self.steps]
        lines.append(f"{len(times)} steps, the fastest in {min(times):,.2f} ms, the slowest in {max(times):,.2f} ms")
        if self.flops is not None and self.rate is not None:
            total = sum(self.flops.values())
            lines.append(
                f"{total / 1e9:,.1f} GFLOPs a step, {total / self.seconds / 1e9:,.1f} GFLOP/s: {self.utilisation:.1%} "
                f"of the {self.rate / 1e9:,.1f} GFLOP/s measured for {self.settings.dtype} matrices"
            )
        if self.peak_memory is not None:
            of = "tensors on the GPU" if self.settings.device.startswith("cuda") else "the process"
            lines.append(f"{self.peak_memory / 2**30:,.2f} GiB at the peak, of {of}")
        return [*lines, self.note] if self.note else lines

    def text(self) -> str:
        """Table, figures and hints as plain lines."""
        rows = [("where the time goes", "ms", "share"), *self.rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        table = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
        return "\n".join([*table, "", *self.facts(), *(f"- {hint}" for hint in self.advice())])

    def advice(self) -> list[str]:
        """What could be done about what takes most, by rule of thumb."""
        found = [self._about_data(), self._about_padding(), self._about_decay(), self._about_optimizer()]
        return [hint for hint in (*found, self._about_others(), self._about_rest(), self._about_use()) if hint]

    def _about_data(self) -> str:
        if self.share(DATA) < _MUCH_DATA:
            return ""
        now = self.settings.workers
        more = "prepare the data before the training, or raise" if now else "raise"
        return f"data takes {self.share(DATA):.0%}: {more} dataloader_num_workers, which is {now}"

    def _about_padding(self) -> str:
        if self.padding is None or self.padding < _MUCH_PADDING:
            return ""
        return f"{self.padding:.0%} of the tokens are padding: pack examples, or batch those of one length together"

    def _about_decay(self) -> str:
        if self.share(DECAY) < _MUCH_DECAY:
            return ""
        cheaper = "frobenius_mode=decoupled leaves autograd out of it" if self.settings.penalty else "lower ranks"
        return f"decay takes {self.share(DECAY):.0%}: {cheaper}; its cost does not grow with the batch"

    def _about_optimizer(self) -> str:
        if self.share(OPTIMIZER) < _MUCH_OPTIMIZER:
            return ""
        return (
            f"the optimizer takes {self.share(OPTIMIZER):.0%}: its cost does not grow with the batch, so take a larger "
            f"one, or more gradient_accumulation_steps than {self.settings.accumulation}"
        )

    def _about_others(self) -> str:
        if self.share(COMMUNICATION) < _MUCH_COMMUNICATION:
            return ""
        return (
            f"communication takes {self.share(COMMUNICATION):.0%}: a larger batch or more gradient_accumulation_steps; "
            "`hf-fnl plan` shows which engine sends less"
        )

    def _about_rest(self) -> str:
        share = self.share(REST) + self.share(ASIDE)
        if share < _MUCH_REST:
            return ""
        return f"{share:.0%} is neither: log, evaluate and save less often (logging_steps, eval_steps, save_steps)"

    def _about_use(self) -> str:
        if self.utilisation is None or self.utilisation >= _LITTLE_USE:
            return ""
        options = ["a larger batch"]
        if self.settings.dtype == "float32" and self.settings.device.startswith("cuda"):
            options.append("bf16")
        if not self.settings.compiled:
            options.append("torch_compile")
        return f"FLOP utilisation is {self.utilisation:.0%}: {', '.join(options)}; ranks that are multiples of 64"
