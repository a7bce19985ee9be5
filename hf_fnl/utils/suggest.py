"""Text that people read: what an unknown name may have been meant to be, and names without control characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: ``"; did you mean ffn_rank?"``, or nothing where none is like it.

    Like a name are those that are spelt almost as it is; else those that contain it, as ``num_train_epochs`` does
    ``epochs``, and one of which it has the initials, as ``lr`` has of ``learning_rate``.

    Args:
        given: The unknown name. Its case, and dashes at its beginning, do not count.
        known: The names there are.
    """
    bare = given.lower().lstrip("-").replace("-", "_")
    names = {name.lower().lstrip("-"): name for name in known}
    found = get_close_matches(bare, names, n=1, cutoff=0.6)
    if not found and len(bare) > 1:
        initials = [name for name in names if "".join(word[:1] for word in name.split("_")) == bare]
        found = initials[:1] or [name for name in names if len(bare) > 2 and bare in name][:3]
    return f"; did you mean {' or '.join(names[name] for name in found)}?" if found else ""


def one_line(text: object) -> str:
    """Text without its line breaks and other wide spaces."""
    return " ".join(str(text).split())


def as_typed(text: object, options: Mapping[str, str]) -> str:
    """A message in one line that names options as they were typed: ``--ffn-rank must ...`` for ``ffn_rank must ...``.

    Args:
        text: The message. Names are its first word, and words with an underscore.
        options: What was typed, by the name that the message may have.
    """
    name = r"(?:^\w+|(?<![\w.-])[a-z]+(?:_[a-z]+)+)(?![\w=(])"
    return re.sub(name, lambda found: options.get(found[0], found[0]), one_line(text))


def printable(text: object) -> str:
    """Text as it may be shown: what would move a terminal's cursor, colour or hide text is written as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def listed(names: Iterable[str], limit: int = 4) -> str:
    """Names for a message: the first ones, and how many there are."""
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
