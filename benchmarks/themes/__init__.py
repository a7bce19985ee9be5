"""The themes of ``python -m benchmarks``; each module holds a ``THEME``."""

NAMES = (
    "init",
    "optimizer",
    "bert_step",
    "gpt2_step",
    "generate",
    "marian",
    "vision",
    "layers",
    "loading",
    "data",
    "memory",
    "calibration",
)
