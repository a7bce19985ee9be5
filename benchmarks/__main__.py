"""Run all themes, one after the other: ``python -m benchmarks [--device cpu|cuda] [--quick] [--out FOLDER]``."""

from __future__ import annotations

import sys

from benchmarks import bert, convolution, language, loading, optimizer, spectral, vision

THEMES = (spectral, optimizer, bert, language, loading, convolution, vision)


def main(argv: list[str] | None = None) -> None:
    """Pass the arguments on to every theme."""
    for theme in THEMES:
        theme.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
