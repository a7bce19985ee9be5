"""German-English phrases that need no network: numbers and dates in words, inside short sentences.

German counts units before tens and puts verbs where English does not, so the task is small but no copying.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from hf_fnl.utils.extras import require

SIZES = {"train": 20_000, "validation": 500, "test": 500}
LANGUAGES = ("de", "en")
_SEED = 2021

Phrase = tuple[str, str]  # German, English

_MONTHS = [
    ("Januar", "January"), ("Februar", "February"), ("März", "March"), ("April", "April"), ("Mai", "May"),
    ("Juni", "June"), ("Juli", "July"), ("August", "August"), ("September", "September"), ("Oktober", "October"),
    ("November", "November"), ("Dezember", "December"),
]  # fmt: skip
_THINGS = [
    ("Äpfel", "apples"), ("Bücher", "books"), ("Stühle", "chairs"), ("Eier", "eggs"), ("Briefe", "letters"),
    ("Blumen", "flowers"), ("Flaschen", "bottles"), ("Bilder", "pictures"),
]  # fmt: skip
_BUYERS = [
    ("ich habe", "I"), ("wir haben", "we"), ("er hat", "he"), ("sie hat", "she"), ("meine Schwester hat", "my sister"),
    ("der Lehrer hat", "the teacher"), ("die Kinder haben", "the children"),
]  # fmt: skip
_DEEDS = [("gekauft", "bought"), ("gezählt", "counted"), ("verloren", "lost"), ("gefunden", "found")]
_EVENTS = [
    ("wurde meine Mutter geboren", "my mother was born"), ("wurde die Brücke gebaut", "the bridge was built"),
    ("begann der Krieg", "the war began"), ("starb der König", "the king died"),
]  # fmt: skip


def embedded_phrases(split: str, *, languages: tuple[str, str] = LANGUAGES) -> dict[str, list[str]]:
    """Return the phrases of a split; the same ones on every call, and no sentence of one split in another.

    Args:
        split: "train", "validation" or "test".
        languages: ``("de", "en")`` or the other way round.

    Returns:
        The lists ``source`` and ``target``.

    Raises:
        ValueError: If there is no such split or language.
    """
    if split not in SIZES:
        raise ValueError(f"split of the embedded phrases must be one of {', '.join(SIZES)}, got {split!r}")
    if sorted(languages) != sorted(LANGUAGES):
        raise ValueError(f"languages of the embedded phrases are {' and '.join(LANGUAGES)}, got {languages}")
    german, english = zip(*_phrases()[split], strict=True)
    texts = dict(zip(LANGUAGES, (list(german), list(english)), strict=True))
    return {"source": texts[languages[0]], "target": texts[languages[1]]}


@cache
def _phrases() -> dict[str, list[Phrase]]:
    rng = random.Random(_SEED)
    found: dict[str, str] = {}
    seen: set[str] = set()
    while len(found) < sum(SIZES.values()):
        german, english = (_sentence(part) for part in rng.choice(_KINDS)(rng))
        if german not in found and english not in seen:
            found[german] = english
            seen.add(english)
    phrases = iter(found.items())
    return {split: [next(phrases) for _ in range(size)] for split, size in SIZES.items()}


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


@cache
def _number(value: int, to: str = "cardinal") -> Phrase:
    num2words = require("num2words", "the embedded phrases are made by", "hf_fnl[tasks]").num2words
    return num2words(value, lang="de", to=to), num2words(value, lang="en", to=to)


def _of_any_length(rng: random.Random, digits: int) -> int:
    """Return a number of 1 to ``digits`` digits, each count as likely, at least 2: German says one as it says a."""
    return rng.randrange(2, 10 ** rng.randint(1, digits))


def _purchase(rng: random.Random) -> Phrase:
    (subject, who), (things, plural), (participle, did) = map(rng.choice, (_BUYERS, _THINGS, _DEEDS))
    german, english = _number(_of_any_length(rng, 6))
    return f"{subject} {german} {things} {participle}", f"{who} {did} {english} {plural}"


def _date(rng: random.Random) -> Phrase:
    german, english = _number(rng.randint(1, 28), "ordinal")
    year, in_year = _number(rng.randrange(1100, 2000), "year")
    (month, of_month), (event, happened) = rng.choice(_MONTHS), rng.choice(_EVENTS)
    return f"am {german}n {month} {year} {event}", f"{happened} on the {english} of {of_month} {in_year}"


_KINDS: tuple[Callable[[random.Random], Phrase], ...] = (_purchase, _date)
