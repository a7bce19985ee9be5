"""What the trainings of a grid share: options, results, checkpoints, stopping in time, and steps as CUDA graphs."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.grid_runs import BROKEN_OFF, CHECKPOINT, RESULT, commit
from benchmarks.grid_tables import write_text
from benchmarks.harness.machine import machine
from benchmarks.harness.record import command_line

EAGER_STEPS = 3  # before a capture, so that every library has made what it makes once
_FAILURE = "HF_FNL_CAPTURE_FAILURE"  # environment variable by which a run that begins again knows why
MARGIN = 5.0  # seconds before the deadline at which a run stops, to write its checkpoint


def run_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that the runner of grids gives to every training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of weights and data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--deadline", type=float, default=math.inf, help="Unix time before which the run has to end")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--eager", action="store_true", help="run steps one operation at a time, not as CUDA graphs")
    return parser


class Broken(Exception):
    """A run that stops with a checkpoint, because its time is over or it was told to."""


class CaptureFailed(Exception):
    """A step that cannot be captured as a CUDA graph; what the device computes afterwards is not to be relied on."""


def run_program(program: str, main: Callable[[list[str]], Any]) -> None:
    """Run a training as a process: ends with ``BROKEN_OFF`` if it is to go on, begins again eagerly if a capture fails.

    Args:
        program: Module that runs.
        main: Its main function.
    """
    try:
        main(sys.argv[1:])
    except Broken as reason:
        print(f"stopped: {reason}", file=sys.stderr, flush=True)
        sys.exit(BROKEN_OFF)
    except CaptureFailed as failure:
        os.environ[_FAILURE] = f"ran eagerly: {failure}"
        print(os.environ[_FAILURE], file=sys.stderr, flush=True)
        os.execv(sys.executable, [sys.executable, "-m", program, *sys.argv[1:], "--eager"])


class Run:
    """The folder of a run: its result, its checkpoint, and whether it has to stop.

    Args:
        options: What :func:`run_parser` and the program parsed.
        program: Module that runs, for the command in the result.
        argv: Its arguments.
    """

    def __init__(self, options: argparse.Namespace, program: str, argv: list[str]) -> None:
        self.folder: Path = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(options.device)
        self.deadline: float = options.deadline
        self.command = command_line(program, argv)
        self.began, self.seconds_before = time.perf_counter(), 0.0
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = [os.environ[_FAILURE]] if _FAILURE in os.environ else []
        self._told_to_stop = False

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop at the next :meth:`check` after a SIGTERM, instead of at once."""

        def stop(number: int, frame: Any) -> None:
            self.tell_to_stop()

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def tell_to_stop(self) -> None:
        """Let the run stop at its next :meth:`must_stop`."""
        self._told_to_stop = True

    def must_stop(self) -> bool:
        """Whether the run was told to stop or its time is over."""
        return self._told_to_stop or time.time() > self.deadline - MARGIN

    def log(self, **figures: Any) -> None:
        """Keep a line of the history and print it."""
        self.history.append(figures)
        shown = ", ".join(
            f"{name} {value:.5g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
        print(f"[{self.seconds():.1f} s] {shown}", flush=True)

    def note(self, text: str) -> None:
        """Keep what a reader of the result has to know, and print it."""
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def seconds(self) -> float:
        """Seconds of this run, those before it was broken off included."""
        return self.seconds_before + time.perf_counter() - self.began

    def save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint; it appears whole or not at all."""
        state = {**state, "history": self.history, "notes": self.notes, "seconds": self.seconds()}
        state["random"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        partial = self.folder / f"{CHECKPOINT}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / CHECKPOINT)

    def load(self) -> dict[str, Any] | None:
        """Read the checkpoint, if there is one; :meth:`restore_random` then goes on with its random numbers."""
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.history, self.notes, self.seconds_before = state["history"], state["notes"], state["seconds"]
        return state

    def restore_random(self, state: dict[str, Any]) -> None:
        """Go on with the random numbers of a checkpoint."""
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.device)

    def finish(self, measures: dict[str, float], **more: Any) -> dict[str, Any]:
        """Write ``result.json`` and remove the checkpoint."""
        result = {
            "measures": measures,
            **more,
            "history": self.history,
            "notes": self.notes,
            "command": self.command,
            "commit": commit() or None,
            "seconds": self.seconds(),
            "machine": machine(str(self.device)),
        }
        write_text(self.folder / RESULT, json.dumps(result, indent=1) + "\n")
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return result


def set_rate(optimizer: Optimizer, rate: Tensor) -> None:
    """Let all groups of an optimizer read their learning rate from one tensor, which a CUDA graph reads too."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def precision(options: argparse.Namespace, run: Run) -> torch.autocast:
    """Return a context for a forward pass: bfloat16 where the options ask for it."""
    return torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=options.bf16)


class TextTraining:
    """Base of the trainings of text models: going on from a checkpoint, stopping, logging.

    Subclasses set ``model``, ``optimizer``, ``rate`` (a tensor that the optimizer reads) and ``loss`` (a tensor, the
    sum since the last log).

    Args:
        options: Of the program.
        run: The run.
    """

    model: Any
    optimizer: Optimizer
    rate: Tensor
    loss: Tensor

    def __init__(self, options: argparse.Namespace, run: Run) -> None:
        self.options, self.run = options, run

    def restore(self, state: dict[str, Any]) -> int:
        """Go on from a checkpoint; returns its step."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_rate(self.optimizer, self.rate)
        self.loss.fill_(state["loss"])
        self.run.restore_random(state)
        return int(state["step"])

    def must_stop(self, number: int, **more: Any) -> bool:
        """Whether to stop; waits for the device, which would otherwise lie far behind the loop, and then saves."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        if not self.run.must_stop():
            return False
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.run.save({"step": number, "loss": self.loss.item(), **states, **more})
        return True

    def take_loss(self, step: int) -> float:
        """Return the mean loss since the last log.

        Raises:
            FloatingPointError: If it is not finite.
        """
        loss = self.loss.item() / self.options.log_steps
        self.loss.zero_()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; lower --lr")
        return loss


class RepeatedStep:
    """A training step without arguments, on a GPU captured once as a CUDA graph and then replayed.

    The first steps run eagerly, on the stream that captures. What ``step`` reads and writes has to stay where it is in
    memory.

    Args:
        step: Makes one update: draws a batch, goes forward and backward, moves the parameters.
        device: Where.
        capture: ``False`` runs every step eagerly.

    Raises:
        CaptureFailed: By a call, if the step cannot be captured.
    """

    def __init__(self, step: Callable[[], None], device: torch.device, *, capture: bool = True) -> None:
        self.step, self.device = step, device
        self._capture = capture and device.type == "cuda"
        self._graph: Any = None
        self._eager = 0
        self._stream: Any = torch.cuda.Stream(device) if self._capture else None

    def __call__(self) -> None:
        """Make one update."""
        if self._capture and self._graph is None and self._eager >= EAGER_STEPS:
            self._graph = self._captured()
        if self._graph is not None:
            self._graph.replay()
        elif self._capture:
            self._eager += 1
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                self.step()
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        else:
            self.step()

    def _captured(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self.step()
        except Exception as error:  # whatever an operation raises that cannot be captured
            message = (str(error).splitlines() or [""])[0]
            raise CaptureFailed(f"{type(error).__name__}: {message}") from error
        return graph
