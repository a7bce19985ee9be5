"""Phases of BERT's pretraining: sequences of one length each, with a rate, a warm-up and a batch of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_fnl.training.arguments import FLAMBeTrainingArguments

FORM = "length[:steps[:learning_rate[:warmup[:batch]]]]"
PHASES_HELP = (
    f"{FORM} each; an empty field is that of the other options. warmup: steps, or a share of the phase below 1; batch: "
    "sequences of a step, over all processes and accumulated batches. NVIDIA's LAMB recipe is "
    "128:7038:6e-3:0.2843:65536 512:1563:4e-3:0.128:32768."
)


@dataclass(frozen=True)
class Phase:
    """Part of a training with sequences of its own length; ``None`` is what the training arguments say.

    Attributes:
        text: As it was given.
        length: Tokens of a sequence.
        steps: Updates.
        learning_rate: Highest rate.
        warmup: Steps of linear warm-up, or a share of the steps if below 1.
        batch: Sequences of an update, over all processes and accumulated batches.
    """

    text: str
    length: int
    steps: int | None = None
    learning_rate: float | None = None
    warmup: float | None = None
    batch: int | None = None

    @classmethod
    def parse(cls, text: str) -> Phase:
        """Read ``length[:steps[:learning_rate[:warmup[:batch]]]]``.

        Raises:
            ValueError: If it has another form, or a value is out of range.
        """
        kinds = {"length": int, "steps": int, "learning_rate": float, "warmup": float, "batch": int}
        words = text.split(":")
        try:
            given = {name: kinds[name](word) for name, word in zip(kinds, words, strict=False) if word}
            phase = cls(text, **given)
        except (TypeError, ValueError):
            phase = None
        if phase is None or len(words) > len(kinds):
            raise ValueError(f"phases: expected {FORM}, got {text!r}")
        for name, value in given.items():
            if not (value >= 0 if name == "warmup" else value > 0) or value == float("inf"):
                raise ValueError(
                    f"phases: {name} must be {'at least' if name == 'warmup' else 'above'} 0, got {text!r}"
                )
        if phase.warmup is not None and phase.warmup >= 1 and phase.warmup % 1:
            raise ValueError(f"phases: warmup must be a number of steps or a share below 1, got {text!r}")
        return phase

    def arguments(self, args: FLAMBeTrainingArguments, number: int) -> FLAMBeTrainingArguments:
        """Return the training arguments of this phase, the ``number``-th, which has a folder of its own.

        Raises:
            ValueError: If the warm-up takes all steps of the phase, or no accumulation makes the batch.
        """
        args = copy.copy(args)
        args.deepspeed_plugin = copy.deepcopy(args.deepspeed_plugin)  # a Trainer fills in its accumulation for good
        args.output_dir = str(Path(args.output_dir) / f"phase-{number}")
        args.max_steps = self.steps or args.max_steps
        args.learning_rate = self.learning_rate or args.learning_rate
        if self.warmup is not None:
            args.warmup_steps = self.warmup
        if args.max_steps > 0 and (warmup := args.get_warmup_steps(args.max_steps)) >= args.max_steps:
            option = "its warmup" if self.warmup is not None else "warmup_steps, for want of a warmup of its own,"
            raise ValueError(
                f"phases: {self.text} has {args.max_steps} steps, and {option} is {warmup}: give {FORM} with fewer"
            )
        if self.batch is not None:
            args.gradient_accumulation_steps = self._accumulation(args)
        return args

    def _accumulation(self, args: FLAMBeTrainingArguments) -> int:
        if args.gradient_accumulation_steps != 1:
            raise ValueError(
                f"phases: {self.text} says how large a batch is; leave out gradient_accumulation_steps, got "
                f"{args.gradient_accumulation_steps}"
            )
        if args.deepspeed is not None:
            raise ValueError(
                f"phases: the batch of {self.text} and deepspeed={args.deepspeed}, which is read before it, do not go "
                "together: launch with accelerate and run_scripts/launch/zero2.yaml or its like"
            )
        at_once = args.train_batch_size * args.world_size
        if self.batch is None or self.batch % at_once:
            raise ValueError(
                f"phases: the batch of {self.text} must be a multiple of {at_once}, the sequences that "
                f"{at_once // args.per_device_train_batch_size} devices take at once with per_device_train_batch_size="
                f"{args.per_device_train_batch_size}"
            )
        return self.batch // at_once


def describe_phase(args: FLAMBeTrainingArguments, phase: Phase) -> str:
    """Say what an update of a phase consists of, from its own training arguments."""
    at_once, accumulated = args.train_batch_size * args.world_size, args.gradient_accumulation_steps
    devices = at_once // args.per_device_train_batch_size
    steps = f"{args.max_steps:,} updates" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    factors = f"{devices:,} {'device' if devices == 1 else 'devices'} x {args.per_device_train_batch_size:,} sequences"
    return (
        f"{Path(args.output_dir).name}: {steps} of {at_once * accumulated:,} sequences of {phase.length} tokens "
        f"({factors} x {accumulated:,} accumulated), rate {args.learning_rate:g}, warm-up {args.warmup_steps:g}"
    )


def plan_phases(texts: Sequence[str], args: FLAMBeTrainingArguments) -> list[tuple[Phase, FLAMBeTrainingArguments]]:
    """Read phases, each with the training arguments it runs with.

    Raises:
        ValueError: If there is none, or one does not fit; see :class:`Phase`.
    """
    if not texts:
        raise ValueError(f"phases: expected {FORM} at least once")
    phases = [Phase.parse(text) for text in texts]
    return [(phase, phase.arguments(args, number)) for number, phase in enumerate(phases, start=1)]
