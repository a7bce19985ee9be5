"""Factorized neural layers for Hugging Face Transformers.

Low-rank and per-head factorized models, Frobenius decay and the FLAMBe optimizer, after Khodak et al. (ICLR 2021) and
Kamalakara et al. (2022). Importing this package registers the factorized models with Transformers' Auto classes.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"


def _runs_command_line() -> bool:
    """Whether Python was started as ``hf-fnl`` or ``python -m hf_fnl``, whose ``--help`` waits for no torch.

    Where in doubt it was not: then importing this takes longer, and nothing is missing.
    """
    argv = getattr(sys, "argv", None) or [""]
    started_as = sys.orig_argv[-len(argv)] if len(argv) <= len(sys.orig_argv) else ""
    if argv[0] == "-m":  # which Python has there while it looks for the module to run, when this package is imported
        return started_as == "hf_fnl"
    return started_as == argv[0] and PurePath(started_as).name in ("hf-fnl", "hf-fnl.exe")


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
