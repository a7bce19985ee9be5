"""The outputs of a command: its result on stdout, everything else on stderr, and errors as one line."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from hf_fnl.utils.suggest import as_typed, one_line, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 200  # columns of a table that goes into a file or a pipe


class Terminal:
    """The two outputs of a command.

    Args:
        as_json: The result is to be one JSON object.
        options: How those of the command are typed, by the names that functions have for them; for errors.
    """

    def __init__(self, *, as_json: bool, options: Mapping[str, str] | None = None) -> None:
        from rich.console import Console  # which --help does not wait for

        self.as_json = as_json
        self._options = options or {}
        # Names may hold brackets and colons, which are no markup.
        plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
        self._stdout = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDE, **plain)
        self._stderr = Console(file=sys.stderr, soft_wrap=True, **plain)
        self.interactive = not as_json and sys.stderr.isatty()

    def show(self, result: dict[str, Any], *views: RenderableType) -> None:
        """Print the result of the command: as JSON where that was asked for, otherwise its views."""
        if self.as_json:
            self._stdout.file.write(json.dumps(result, indent=2) + "\n")
        else:
            for view in views:
                is_text = isinstance(view, str)
                self._stdout.print(printable(view) if is_text else view, soft_wrap=is_text)

    def note(self, text: str) -> None:
        """Print a line for a person, beside the result."""
        self._stderr.print(printable(text))

    def error(self, error: Exception) -> str:
        """Return the message of an error in one line, with the options of the command as they are typed."""
        return printable(as_typed(error, self._options))

    @contextlib.contextmanager
    def usage(self) -> Iterator[None]:
        """Make options of what was typed; what is refused of it is an error of usage, of exit code 2."""
        try:
            yield
        except ValueError as error:
            raise typer.BadParameter(self.error(error)) from error

    def step(self, text: str) -> contextlib.AbstractContextManager[object]:
        """Show that something takes its time."""
        from rich.text import Text

        return self._stderr.status(Text(text)) if self.interactive else contextlib.nullcontext()


@contextlib.contextmanager
def session(context: typer.Context, *, as_json: bool, debug: bool, sources: Sequence[str] = ()) -> Iterator[Terminal]:
    """Run a command: errors become a line and exit code 1, and libraries are kept off stdout.

    Args:
        context: The command.
        as_json: As in :class:`Terminal`.
        debug: Let errors pass with their tracebacks.
        sources: Folders and Hub ids that have to be there, which is found out before torch is imported.
    """
    parameters = context.command.params
    options = {str(each.name): each.opts[0] for each in parameters if each.param_type_name == "option"}
    terminal = Terminal(as_json=as_json, options=options)
    try:
        for source in sources:
            from hf_fnl.utils.hub import check_source

            check_source(source)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), _quiet(terminal.interactive):
            warnings.filterwarnings("always", category=UserWarning, module=r"hf_fnl\.")  # whatever Python was told
            warnings.showwarning = lambda message, *_, **__: terminal.note(f"note: {one_line(message)}")
            yield terminal
    except (typer.BadParameter, typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        unexpected = not isinstance(error, ImportError | OSError | TypeError | ValueError)
        kind = f"{type(error).__name__}: " if unexpected else ""
        terminal.note(f"error: {kind}{terminal.error(error)}{' (--debug shows where)' if unexpected else ''}")
        raise typer.Exit(1) from error


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
