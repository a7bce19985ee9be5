"""Measure themes: ``python -m benchmarks [THEME ...] [--device cpu|cuda] [--quick] [--against GIT_REF]``.

Without a theme, all of them run, one after the other. Each checks its answers before it times anything, times its cases
in turns, and writes ``<theme>-<device>.json``, a table and a plot into ``benchmarks/results``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.against import compare_with
from benchmarks.harness.theme import options_of, parser, theme
from benchmarks.themes import NAMES

logger = logging.getLogger("benchmarks")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Parse, run; returns the results by theme."""
    arguments = parser(__doc__)
    arguments.add_argument("themes", nargs="*", metavar="THEME", help=", ".join(NAMES))
    arguments.add_argument("--against", metavar="GIT_REF", help="time the package of this revision beside this one's")
    given = arguments.parse_args(argv)
    if unknown := sorted(set(given.themes) - set(NAMES)):
        arguments.error(f"unknown theme {unknown[0]!r}; there are {', '.join(NAMES)}")
    results = {}
    for name in given.themes or NAMES:
        options = options_of(name, given, argv)
        logger.info("%s ...", name)
        if given.against:
            results[name] = compare_with(given.against, name, options)
        else:
            results[name] = theme(name).run(options)
    return results


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
