"""The command line of a script: its options and their help, a file of them, and how it ends."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar

import yaml
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import HfArgumentParser, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.utils import logging as transformers_logging

from hf_fnl.utils.processes import close_process_group, is_first
from hf_fnl.utils.suggest import as_typed, did_you_mean, one_line

T = TypeVar("T")

FILES = (".yaml", ".yml", ".json")
INTERRUPTED = 130  # as shells say it of what Ctrl-C ended
INTERVAL = 20.0  # seconds between two updates of a bar in a file
# Of the Trainer's own options those that most runs set; help shows them beside ours.
_OFTEN = (
    *("output_dir", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_grad_norm"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "logging_steps"),
    *("resume_from_checkpoint", "report_to", "seed", "bf16", "use_cpu"),
)
_EPILOG = (
    "Options on the command line override those in the file. Every other option of Transformers' TrainingArguments is "
    "taken by programs that train. --debug shows the traceback of an error."
)


class UsageError(ValueError):
    """Error about what was typed; a script ends with exit status 2."""


def parse_arguments(argv: Sequence[str] | None, *classes: type, description: str | None = None) -> tuple[Any, ...]:
    """Read options into dataclasses: flags, or a YAML or JSON file of them and flags that override it.

    Without any argument the help is printed, and nothing runs.

    Args:
        argv: Command line without the program's name; that of the process unless given.
        classes: Dataclasses of options, with metadata as :class:`transformers.HfArgumentParser` reads it.
        description: Shown by ``--help``.

    Raises:
        FileNotFoundError: If the file does not exist.
        UsageError: If it is not YAML or JSON, an option is unknown, or a value is refused.
        SystemExit: After the help.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = OptionParser(classes, description)
    if not arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if "disable_tqdm" in parser.options:
        parser.set_defaults(disable_tqdm=not sys.stderr.isatty())
    if not arguments[0].startswith("-") and arguments[0].endswith(FILES):
        arguments = [*parser.read_file(Path(arguments[0])), *arguments[1:]]
    if unknown := parser.parse_known_args(arguments)[1]:
        raise UsageError(_about_unknown(unknown[0], [f"--{name}" for name in parser.options]))
    try:
        return parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _about_unknown(word: str, flags: Iterable[str]) -> str:
    """The message about a word on the command line that is no option."""
    if not word.startswith("-"):
        place = "; a configuration file comes first" if word.endswith(FILES) else ""
        return f"{word!r} belongs to no option, which begin with --{place}"
    flag = word.partition("=")[0]
    return f"there is no option {flag}{did_you_mean(flag, flags)}"


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Format of a help: defaults behind what options do, and the description as it stands."""


class OptionParser(HfArgumentParser):
    """The fields of dataclasses as flags; the help leaves out those of the Trainer that few runs set.

    Args:
        classes: Dataclasses of options.
        description: What the script does, and examples.
    """

    def __init__(self, classes: Sequence[Any], description: str | None) -> None:
        self.options = [field.name for kind in classes for field in dataclasses.fields(kind) if field.init]
        self._stock_helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(TrainingArguments)}
        super().__init__(
            classes,
            usage="%(prog)s [FILE.yaml|FILE.json] [--option VALUE ...]",
            description=description,
            epilog=_EPILOG,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As in argparse, with a sentence on what is the Trainer's own, or without a word."""
        name, text = settings.get("dest", names[-1].lstrip("-").replace("-", "_")), settings.get("help") or ""
        if text == self._stock_helps.get(name):
            text = text.partition(". ")[0] if name in _OFTEN else argparse.SUPPRESS
        return super().add_argument(*names, **settings | {"help": text.replace("%", "%%")})

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UsageError(re.sub(r"(--\w+)(?:/--[\w-]+)+", r"\1", message).removeprefix("argument "))

    def read_file(self, path: Path) -> list[str]:
        """Return the options in a file as words of a command line; one that is null keeps its default.

        Raises:
            FileNotFoundError: If it does not exist.
            UsageError: If it cannot be read, or an option in it is unknown.
        """
        words: list[str] = []
        for name, value in read_options(path).items():
            if name not in self.options:
                raise UsageError(f"{path}: there is no option {name}{did_you_mean(name, self.options)}")
            if value == []:  # which no words can say
                self.set_defaults(**{name: value})
            elif isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif value is not None:
                words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
        return words


def read_options(path: Path) -> dict[str, Any]:
    """Return the options in a YAML or JSON file: text as on a command line, ``None``, lists of text, and mappings.

    Text, because YAML takes 1e-3 for a word and ``no`` for a truth value, and options know their types.

    Raises:
        FileNotFoundError: If it does not exist.
        UsageError: If it is not YAML, of which JSON is a part, or no mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such configuration file: {path}")
    try:
        content = path.read_text(encoding="utf-8-sig")
        texts, typed = yaml.load(content, Loader=yaml.BaseLoader) or {}, yaml.safe_load(content) or {}
        if not isinstance(typed, dict):
            raise ValueError(f"expected options and their values, found {str(typed)[:40]!r}")
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {one_line(error)}") from error
    pairs = zip(texts.items(), typed.values(), strict=True)
    return {name: value if isinstance(value, dict | NoneType) else text for (name, text), value in pairs}


@contextlib.contextmanager
def named(option: str, value: object) -> Iterator[None]:
    """Let errors about what an option names begin with the option and its value, as they were typed."""
    try:
        yield
    except (OSError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        listed = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
        raise kind(f"--{option} {listed}: {error}") from error


def check_at_least(smallest: int, options: Any, *names: str) -> None:
    """Raise a ``ValueError`` if an option that is given is below a number."""
    for name in names:
        if (value := getattr(options, name)) is not None and value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


def progress(text: str, total: int | None = None, items: Iterable[T] | None = None) -> Any:
    """Return tqdm's bar of a long step, over items or to be updated; it is seldom drawn where that goes into a file."""
    seconds = 0.1 if sys.stderr.isatty() else INTERVAL
    return tqdm(items, desc=text, total=total, leave=False, delay=1, mininterval=seconds, disable=not is_first())


def tracked(items: Iterable[T], text: str) -> Iterable[T]:
    """Return items that show :func:`progress` when they are iterated over."""
    return progress(text, items=items)


def run_script(main: Callable[[list[str]], object]) -> NoReturn:
    """Run the ``main`` of a script as a program: errors are one line, and the exit status says of which sort.

    0: done; 2: what was typed cannot be run; 130: interrupted; 1: everything else. ``--debug`` shows tracebacks.

    Args:
        main: Called with the arguments of the process.
    """
    arguments, debug = _without_debug(sys.argv[1:])
    rank = int(os.environ.get("RANK", "0"))
    _quiet(first=rank == 0)
    try:
        main(arguments)
        close_process_group()
        raise SystemExit(0)
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "interrupted"
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, ImportError | OSError | ValueError)
        kind = "" if expected else f"{type(error).__name__}: "
        typed = {word.partition("=")[0] for word in arguments}
        told = as_typed(error, {word.removeprefix("--"): word for word in typed if word.startswith("--")})
        status, message = 2 if isinstance(error, UsageError) else 1, f"error: {kind}{told}"
        if not (expected or debug):
            message += " (--debug shows where)"
    if rank == 0:
        print(message, file=sys.stderr)
    elif status == 1:  # what the first process may not have met
        print(f"process {rank}: {message}", file=sys.stderr)
    sys.exit(status)


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without a ``--debug`` that has no value; the Trainer has an option of this name, with one."""
    following = [*arguments, ""][1:]
    values = {option.value for option in DebugOption}
    kept = [word for word, after in zip(arguments, following, strict=False) if word != "--debug" or after in values]
    return kept, len(kept) < len(arguments)


def _quiet(*, first: bool) -> None:
    """Show what concerns a user: our messages, warnings in a line each, and bars only on a terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_fnl").setLevel(logging.INFO if first else logging.WARNING)
    if not first:
        warnings.simplefilter("ignore")
    warnings.showwarning = lambda message, *_, **__: print(f"note: {one_line(message)}", file=sys.stderr)
    if not sys.stderr.isatty():
        import datasets  # which importing this package does not wait for

        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
