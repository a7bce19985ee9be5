"""A learning-rate schedule of Khodak et al. 2021 that Transformers does not have, as factors of the highest rate."""

from __future__ import annotations

from collections.abc import Callable

from hf_fnl.training.arguments import FLAMBeTrainingArguments

Schedule = Callable[[int], float]  # updates that were made -> factor of the rate for the next one


def inverse_sqrt(warmup: int, start: float) -> Schedule:
    r"""Return fairseq's inverse square-root schedule, whose warm-up begins at a share of the rate.

    ``start + (1 - start) step / warmup`` below ``warmup``, then ``sqrt(warmup / step)``. Khodak et al. 2021 translate
    with ``start=1``: the rate is constant for ``warmup`` updates.

    Args:
        warmup: Updates before the rate goes down.
        start: Factor of the first update.
    """

    def factor(step: int) -> float:
        return start + (1 - start) * step / warmup if step < warmup else (warmup / step) ** 0.5

    return factor


def schedule_of(args: FLAMBeTrainingArguments, num_training_steps: int) -> Schedule | None:
    """Return the schedule that ``warmup_start`` asks for; ``None`` for Transformers' own."""
    return inverse_sqrt(args.get_warmup_steps(num_training_steps), args.warmup_start) if args.warmup_start else None
