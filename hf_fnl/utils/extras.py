"""Packages that not everybody has installed."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str, install: str) -> Any:
    """Import a module that only some uses of the package need.

    Args:
        module: Its name.
        purpose: What needs it, for the error.
        install: What ``pip install`` is to be given: a package, or an extra such as ``hf_fnl[vision]``.

    Raises:
        ImportError: If it is not there; says how it is installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{purpose} {module.partition(".")[0]}: pip install "{install}"') from error
