"""Imported first by scripts: what has to hold before the imports that take seconds.

Ctrl-C ends them without a traceback, and bars in a file instead of a terminal are lines now and then.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

INTERRUPTED = 130  # as shells say it of what Ctrl-C ended


def end_quietly(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Show an exception as Python does, but of an interrupt only that there was one."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


sys.excepthook = end_quietly
if not sys.stderr.isatty():
    for name in ("TQDM_DELAY", "TQDM_MININTERVAL"):  # which tqdm reads when it is imported
        os.environ.setdefault(name, "20")
