"""What a command shows and where: its result on stdout, everything else on stderr, and errors as one line."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int], None]

_WIDE = 200  # columns of a table, whatever the terminal has: a line that it wraps is better than a name cut short


class Terminal:
    """The two outputs of a command.

    Args:
        as_json: The result is to be one JSON object.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stdout = Console(file=sys.stdout, width=_WIDE)
        self._stderr = Console(file=sys.stderr, soft_wrap=True)
        self.interactive = not as_json and sys.stderr.isatty()

    def show(self, result: dict[str, Any], *views: RenderableType) -> None:
        """Print the result of the command: as JSON where that was asked for, otherwise its views."""
        if self.as_json:
            self._stdout.file.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        else:
            self._stdout.print(*views, sep="\n", highlight=False)

    def note(self, text: str) -> None:
        """Print a line for a person, beside the result."""
        self._stderr.print(text, markup=False, highlight=False)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[Advance]:
        """Show that something takes its time, as a bar once it is told how much is done and how much there is."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._stderr, transient=True, disable=not self.interactive) as progress:
            task = progress.add_task(text, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def session(*, as_json: bool, debug: bool) -> Iterator[Terminal]:
    """Run a command: errors become a line and exit code 1, and libraries are kept off stdout.

    Args:
        as_json: As in :class:`Terminal`.
        debug: Let errors pass with their tracebacks.
    """
    terminal = Terminal(as_json=as_json)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), _quiet(terminal.interactive):
            warnings.showwarning = lambda message, *_, **__: terminal.note(f"note: {_one_line(message)}")
            yield terminal
    except (typer.BadParameter, typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        unexpected = not isinstance(error, ImportError | OSError | TypeError | ValueError)
        kind = f"{type(error).__name__}: " if unexpected else ""
        terminal.note(f"error: {kind}{_one_line(error)}{' (--debug shows where)' if unexpected else ''}")
        raise typer.Exit(1) from error


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Of Transformers only errors are heard, and its bars only where a person looks; afterwards all is as before."""
    from transformers.utils import logging  # takes seconds, which `--help` does not wait for

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def option(name: str, text: str, panel: str = "Run", *, also: str | None = None, **limits: Any) -> Any:
    """An option that may be written with dashes, as the other commands do, or as the scripts' flags are.

    Args:
        name: With dashes.
        text: Shown by ``--help``.
        panel: Under which it is shown.
        also: A second name.
        **limits: Of its value, as typer takes them.
    """
    names = [name] if also is None else [name, also]
    spellings = dict.fromkeys(f"--{spelling}" for each in names for spelling in (each, each.replace("-", "_")))
    return typer.Option(*spellings, help=text, rich_help_panel=panel, **limits)
