"""Measure themes: ``python -m benchmarks [THEME ...] [--device cpu|cuda] [--quick]``.

Without a theme, all of them run, one after the other. Each checks its answers before it times anything, times its cases
in turns, and writes ``<theme>-<device>.json`` and a table into ``benchmarks/results``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.theme import options_of, parser, theme
from benchmarks.themes import NAMES

logger = logging.getLogger("benchmarks")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Parse, run; returns the results by theme."""
    arguments = parser(__doc__)
    arguments.add_argument("themes", nargs="*", metavar="THEME", help=", ".join(NAMES))
    given = arguments.parse_args(argv)
    if unknown := sorted(set(given.themes) - set(NAMES)):
        arguments.error(f"unknown theme {unknown[0]!r}; there are {', '.join(NAMES)}")
    results = {}
    for name in given.themes or NAMES:
        logger.info("%s ...", name)
        results[name] = theme(name).run(options_of(name, given, argv))
    return results


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
