"""Factorized neural layers for Hugging Face Transformers.

Low-rank and per-head factorized models, Frobenius decay and the FLAMBe optimizer, after Khodak et al. (ICLR 2021) and
Kamalakara et al. (2022). Importing this package registers the factorized models with Transformers' Auto classes.
"""

from __future__ import annotations

import importlib
import sys
from itertools import pairwise
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def _runs_command_line() -> bool:
    """Whether Python was started as ``hf-fnl`` or ``python -m hf_fnl``, whose ``--help`` waits for no torch."""
    started_as = sys.argv[0] if getattr(sys, "argv", None) else ""
    # Python has "-m" there while it looks for the module to run, which is when this package is imported.
    return PurePath(started_as).stem == "hf-fnl" or (started_as == "-m" and ("-m", "hf_fnl") in pairwise(sys.orig_argv))


if TYPE_CHECKING:
    from hf_fnl.public import *  # noqa: F403
elif not _runs_command_line():
    importlib.import_module("hf_fnl.public")


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":  # which Python looks for while it imports this
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("hf_fnl.public"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *importlib.import_module("hf_fnl.public").__all__})
