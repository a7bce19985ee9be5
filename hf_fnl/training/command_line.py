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
import textwrap
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import HfArgumentParser, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.utils import logging as transformers_logging

from hf_fnl.utils.processes import close_process_group, is_first
from hf_fnl.utils.suggest import did_you_mean

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
_TAKES = {dict: "no mapping", list: "one value", NoneType: "a value"}
_TYPES = {int: "INT", float: "FLOAT", str: "TEXT"}


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
    words: list[str] = []
    if not arguments[0].startswith("-") and arguments[0].endswith(FILES):
        words = parser.read_file(path := Path(arguments.pop(0)))
    try:
        given, unknown = parser.parse_known_args([*words, *arguments])
    except UsageError as error:
        option = str(error).partition(":")[0].partition(" must be")[0]
        in_file = any(word.partition("=")[0] == option for word in words)
        overridden = any(word.partition("=")[0] == option for word in arguments)
        raise UsageError(f"{path}: {error}") if in_file and not overridden else error from error
    if unknown:
        raise UsageError(_about_unknown(unknown[0], [f"--{name}" for name in parser.options]))
    try:
        return parser.parse_args_into_dataclasses([*words, *arguments], look_for_args_file=False)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(_with_suggestion(str(error), vars(given))) from error


def parse_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse as argparse does; of a flag that is unknown the ``UsageError`` says which may have been meant."""
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UsageError(_about_unknown(unknown[0], re.findall(r"--\w+", parser.format_usage())))
    return options


def _about_unknown(word: str, flags: Iterable[str]) -> str:
    """The message about a word on the command line that is no option."""
    if not word.startswith("-"):
        place = "; a configuration file comes first" if word.endswith(FILES) else ""
        return f"{word!r} belongs to no option, which begin with --{place}"
    flag = word.partition("=")[0]
    return f"there is no option {flag}{did_you_mean(flag, flags)}"


class OptionParser(HfArgumentParser):
    """The fields of dataclasses as flags, with help in groups, the Trainer's last.

    Args:
        classes: Dataclasses of options.
        description: What the script does, and examples.
    """

    def __init__(self, classes: Iterable[type], description: str | None) -> None:
        self.options: dict[str, argparse.Action] = {}
        self._classes = list(classes)
        super().__init__(self._classes, description=description, allow_abbrev=False)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As in argparse; keeps the first action of each option."""
        settings["help"] = (settings.get("help") or "").replace("%", "%%")
        action = super().add_argument(*names, **settings)
        if action.dest != "help":
            self.options.setdefault(action.dest, action)
        return action

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        message = re.sub(r"(--\w+)(?:/--[\w-]+)+", r"\1", message).removeprefix("argument ")
        if found := re.match(r"--(\w+): invalid choice: '(.*?)'", message):
            message = f"--{found[1]} {_not_among(self.options[found[1]].choices or (), found[2])}"
        raise UsageError(message)

    def read_file(self, path: Path) -> list[str]:
        """Return the options in a file as words of a command line; those that no words can say become defaults.

        Raises:
            FileNotFoundError: If it does not exist.
            UsageError: If it cannot be read, or an option in it is unknown or takes no such value.
        """
        hints = {name: hint for kind in self._classes for name, hint in get_type_hints(kind).items()}
        words: list[str] = []
        for name, value in read_options(path).items():
            if name not in self.options:
                raise UsageError(f"{path}: there is no option {name}{did_you_mean(name, self.options)}")
            kinds = {get_origin(each) or each for each in (hints[name], *get_args(hints[name]))}
            kind = next((kind for kind in (dict, list, NoneType) if isinstance(value, kind)), None)
            if kind is not None and kind not in kinds:
                raise UsageError(f"{path}: {name} takes {_TAKES[kind]}, got {value}")
            if kind in (dict, NoneType) or value == []:
                self.set_defaults(**{name: value})
            else:
                words += [f"--{name}", *map(str, value)] if kind is list else [f"--{name}={value}"]
        return words

    def format_help(self) -> str:
        """Return the help: what the script does, then its options in groups."""
        usage = f"usage: {self.prog} [FILE.yaml|FILE.json] [--option VALUE ...]"
        note = "Options on the command line override those in the file. --debug shows the traceback of an error."
        parts = [(self.description or "").strip(), usage, note]
        trainers = {field.name: field for field in dataclasses.fields(TrainingArguments)}
        for title, fields in self._groups():
            lines = [_help_line(self.options[f.name], brief=f is trainers.get(f.name)) for f in fields]
            parts.append("\n".join([title, *lines]))
        return "\n\n".join(filter(None, parts)) + "\n"

    def _groups(self) -> Iterator[tuple[str, list[dataclasses.Field]]]:
        """Titles, and the options below each."""
        for kind in self._classes:
            fields = [field for field in dataclasses.fields(kind) if field.init]
            if not issubclass(kind, TrainingArguments):
                yield (kind.__doc__ or kind.__name__).partition("\n")[0], fields
                continue
            by_name = {field.name: field for field in fields}
            inherited = dataclasses.fields(TrainingArguments)
            ours = [field.name for field in fields if field not in inherited]
            shown = dict.fromkeys((*(name for name in _OFTEN if name in by_name), *ours))
            yield "Training", [by_name[name] for name in shown]
            yield "All others of the Trainer", [field for field in fields if field.name not in shown]


def read_options(path: Path) -> dict[str, Any]:
    """Return the options in a YAML or JSON file: text as on a command line, ``None``, lists of text, and mappings.

    Text, because YAML takes 1e-3 for a word and ``no`` for a truth value, and options know their types.

    Raises:
        FileNotFoundError: If it does not exist.
        UsageError: If it is not YAML or JSON, no mapping, or names an option twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such configuration file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            typed = json.loads(text, object_pairs_hook=_unique)
            values = json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
        else:
            typed, values = yaml.safe_load(text) or {}, yaml.load(text, Loader=_TextLoader) or {}
        if not isinstance(typed, dict):
            raise ValueError(f"expected options and their values, found {str(typed)[:40]!r}")
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {_one_line(error)}") from error
    return {name: typed[name] if isinstance(typed[name], dict | NoneType) else value for name, value in values.items()}


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of pairs, none of whose names stands twice."""
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise ValueError(f"it names {twice[0]} twice")
    return dict(pairs)


class _TextLoader(yaml.BaseLoader):
    """Loader of YAML whose scalars are text, and whose mappings name nothing twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _unique([(key.value, None) for key, _ in node.value])
        return super().construct_mapping(node, deep)


def _not_among(choices: Iterable[Any], given: object) -> str:
    names = [str(choice) for choice in choices]
    return f"must be one of {', '.join(names)}, got {given!r}{did_you_mean(str(given), names)}"


def _with_suggestion(message: str, given: dict[str, Any]) -> str:
    """A message about a value that is none of some, with the likeliest of them and, of Transformers', the option."""
    if found := re.fullmatch(r"(.*) is not a valid \w+, please select one of \[(.*)\]", message):
        value, known = found[1], found[2].replace("'", "").split(", ")
        name = next((name for name, each in given.items() if str(each) == value), "value")
        return f"{name} {_not_among(known, value)}"
    if "did you mean" in message:
        return message
    if found := re.search(r"(?:one|any) of (.+?)[,;]? (?:but )?got '([^']*)'", message):
        message += did_you_mean(found[2], found[1].replace(" or ", ", ").split(", "))
    return message


def _help_line(action: argparse.Action, *, brief: bool) -> str:
    """An option, its kind of value, what it does, in a sentence where ``brief``, and what it is by default."""
    kind: Any = action.type
    value = _TYPES.get(kind, "TEXT")
    if choices := [str(choice) for choice in action.choices or ()]:
        value = "|".join(choices) if len(choices) < 5 else "NAME"
    elif action.nargs == "?" or kind not in _TYPES:
        value = "true|false"
    text = " ".join((action.help or "").replace("%%", "%").split())
    if brief:
        text = text.partition(". ")[0].rstrip(".") + "."
    if action.required:
        text += " (required)"
    elif action.default not in (None, "", [], argparse.SUPPRESS) and "efault" not in text:
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        text += f" ({getattr(default, 'value', default)!s})"
    head = f"  --{action.dest} {value}{' ...' if action.nargs == '+' else ''}"
    lines = textwrap.wrap(text, width=84, break_on_hyphens=False, max_lines=4, placeholder=" ...") or [""]
    first = [f"{head:<36}{lines[0]}"] if len(head) < 36 else [head, f"{'':36}{lines[0]}"]
    return "\n".join([*first, *(f"{'':36}{line}" for line in lines[1:])])


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


@contextlib.contextmanager
def progress(text: str, total: int | None = None) -> Iterator[Callable[[int], object]]:
    """Show how far a long step is and how long it will take; seldom where that goes into a file.

    Args:
        text: What is being done.
        total: How much there is to do; a bar without it shows no time left.

    Yields:
        A function to be called with how much more is done.
    """
    seconds = 0.1 if sys.stderr.isatty() else INTERVAL
    with tqdm(desc=text, total=total, leave=False, delay=1, mininterval=seconds, disable=not is_first()) as bar:
        yield bar.update


def tracked(items: Iterable[T], text: str) -> Iterator[T]:
    """Iterate over items and show :func:`progress`."""
    with progress(text, getattr(items, "__len__", lambda: None)()) as advance:
        for item in items:
            yield item
            advance(1)


def run_script(main: Callable[[list[str]], object], *, resumes: bool = False) -> NoReturn:
    """Run the ``main`` of a script as a program: errors are one line, and the exit status says of which sort.

    0: done; 2: what was typed cannot be run; 130: interrupted; 1: everything else. ``--debug`` shows tracebacks.

    Args:
        main: Called with the arguments of the process.
        resumes: Whether the script has ``--resume_from_checkpoint``.
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
        if resumes:
            message += (
                ": the same command with --resume_from_checkpoint true goes on from the last checkpoint that was saved"
            )
    except Exception as error:
        if debug:
            traceback.print_exc()
        expected = isinstance(error, ImportError | OSError | ValueError)
        kind = "" if expected else f"{type(error).__name__}: "
        status, message = 2 if isinstance(error, UsageError) else 1, f"error: {kind}{_as_typed(error, arguments)}"
        if not (expected or debug):
            message += " (--debug shows where)"
    if rank == 0:
        print(message, file=sys.stderr)
    elif status == 1:  # what the first process may not have met
        print(f"process {rank}: {message}", file=sys.stderr)
    sys.exit(status)


def _as_typed(error: Exception, arguments: Sequence[str]) -> str:
    """A message in one line that names an option as it was typed, on the command line or in a file."""
    message = _one_line(error)
    first = re.match(r"\w*", message)
    typed = {word.partition("=")[0] for word in arguments}
    return f"--{message}" if first and f"--{first[0]}" in typed else message


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
    warnings.showwarning = lambda message, *_, **__: print(f"note: {_one_line(message)}", file=sys.stderr)
    if not sys.stderr.isatty():
        import datasets  # which importing this package does not wait for

        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
