"""The themes of ``python -m benchmarks``; each module holds a ``THEME``."""

NAMES = (
    "init",
    "optimizer",
    "bert_step",
    "vision",
    "loading",
    "memory",
    "calibration",
)
