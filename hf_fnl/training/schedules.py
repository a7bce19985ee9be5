"""Learning-rate schedules of the papers' recipes that Transformers does not have, as factors of the highest rate."""

from __future__ import annotations

from collections.abc import Callable

from hf_fnl.training.arguments import FLAMBeTrainingArguments

Schedule = Callable[[int], float]  # updates that were made -> factor of the rate for the next one


def polynomial(warmup: int, steps: int, power: float) -> Schedule:
    r"""Return the schedule of NVIDIA's LAMB BERT, with which Khodak et al. 2021 pretrain.

    Update ``n`` of ``n = 1 ... steps`` has the factor ``n / warmup`` below ``warmup`` and ``(1 - n / steps)^power``
    from there on. So the rate jumps down at the end of the warm-up, and the last update has the rate zero. The
    polynomial decay of Transformers begins at 1 there, and is ``(1 - warmup / steps)^-power`` times as high.

    Args:
        warmup: Updates of linear warm-up.
        steps: All updates.
        power: 0.5 in that recipe.
    """

    def factor(step: int) -> float:
        update = step + 1
        return update / warmup if update < warmup else max(0.0, 1 - update / steps) ** power

    return factor


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
    """Return the schedule that ``lr_power`` or ``warmup_start`` ask for; ``None`` for Transformers' own.

    Raises:
        ValueError: If the warm-up of ``lr_power`` takes the whole training.
    """
    if args.lr_power is None and not args.warmup_start:
        return None
    warmup = args.get_warmup_steps(num_training_steps)
    if args.lr_power is not None:
        if warmup >= num_training_steps:
            raise ValueError(f"warmup_steps must be below the {num_training_steps} steps of the training, got {warmup}")
        return polynomial(warmup, num_training_steps, args.lr_power)
    return inverse_sqrt(warmup, args.warmup_start)
