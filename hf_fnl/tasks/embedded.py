"""A corpus and a question-answering set that need no network: the Python language reference inside CPython.

CPython ships the reference as plain text for ``help()``, in ``pydoc_data.topics``: some 80 topics, 465 kB. It differs a
little from one Python version to the next; within one version everything here is the same on every call.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

VALIDATION_EVERY = 5
CONTEXT_WORDS = 70  # about 100 word pieces, so that a context and its question fit in 128 or 160
MAX_ANSWER_WORDS = 16
MAX_CLOZE_WORDS = 25  # a question repeats its sentence, and BERT cuts questions at 64 word pieces

_HEADING = re.compile(r"^(.+)\n([*=\-^~\"'+#])\2{2,}$", re.MULTILINE)
_LIST_MARKER = re.compile(r"^(?:[*•+-]|\d+\.|\[\d+\]|Note:|See also:)\s+")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*]*)\*{1,2}(?![\w*])")
_FOOTNOTE_MARK = re.compile(r" \[\d+\]")
_CODE = re.compile(r"::=|^\s*>>>|^\s*\.\.\.|^\s*(?:class|def|for|while|with|try|import|from) [^.]*:$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[A-Z\"“(])")
_QUOTED_TERM = re.compile(r'"([A-Za-z_][\w.]+\w(?:\(\))?)"')
_VERSION_NOTE = re.compile(r"^(?:Changed in|New in|Deprecated since) version (\d+(?:\.\d+)*): (.+)\.$")
_CONDITIONAL = re.compile(r"^(If|When) ([^,;:]+), (?:then )?([^;:]+)\.$")
_STATEMENT = re.compile(r'^The ("\w+" (?:statement|expression|function|method|clause)) ([a-z]+s [^;:]+)\.$')
_DESCRIPTION = re.compile(r"^((?:A|An|The)(?: (?!that\b|which\b|if\b)[^\s,;:.]+){1,5}?) ((?:is|are) [^;:]+)\.$")
_ENGLISH_WORD = re.compile(
    r"\b(?:an?|the|of|to|by|on|be|are|can|may|will|th(?:is|at|ese)|which|its?|they|when|used)\b", re.I
)


def embedded_documents() -> list[str]:
    """Return the Python language reference as English prose, one document a topic, in the order of the topic names.

    Grammar, code and underlines are left out; headings stay. Paragraphs are separated by an empty line and each stands
    on one line. Several topics of the reference contain others: a paragraph is kept only in the shortest topic that has
    it, and topics with nothing of their own are left out.

    Returns:
        The documents, never empty strings.

    Raises:
        ModuleNotFoundError: If this Python was built without ``pydoc_data``.
    """
    return list(_documents().values())


def embedded_squad(split: str) -> dict[str, Any]:
    """Make extractive questions from the Python language reference, in the JSON structure of SQuAD v1.1.

    The templates, each applied to single sentences (the answer is a span of the context that holds the sentence):

    - "Changed in version V: S." gives "In which version: S?", answered by V;
    - "If C, R." and "When C, R." give "What happens if C?", answered by R;
    - 'The "x" statement does D.' gives 'What does the "x" statement do?', answered by what follows; so for functions;
    - "The X is D." gives "What is said of the X?", answered by "is D";
    - a term T quoted once in a sentence gives "Which exception (method, function, keyword, name) is missing: S?" with a
      blank in its place, answered by T.

    Args:
        split: "train" or "validation". Every fifth document is held out; documents share no paragraph.

    Returns:
        ``{"version": "1.1", "data": [{"title", "paragraphs": [{"context", "qas": [...]}]}]}``.

    Raises:
        ValueError: If ``split`` is neither of the two.
        ModuleNotFoundError: If this Python was built without ``pydoc_data``.
    """
    if split not in ("train", "validation"):
        raise ValueError(f'split of the embedded questions must be "train" or "validation", got {split!r}')
    documents = list(_documents().items())
    held_out = documents[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    chosen = held_out if split == "validation" else [item for item in documents if item not in held_out]
    articles = ({"title": title, "paragraphs": _questioned_paragraphs(title, text)} for title, text in chosen)
    return {"version": "1.1", "data": [article for article in articles if article["paragraphs"]]}


@cache
def _documents() -> dict[str, str]:
    """Return the cleaned text of every topic that has paragraphs of its own, by topic name in sorted order."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the embedded corpus is read from pydoc_data, which this Python was built without; "
            "give a Hub dataset or files of your own instead"
        ) from error
    seen: set[str] = set()
    documents = {}
    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        paragraphs = [paragraph for paragraph in dict.fromkeys(_paragraphs(text)) if paragraph not in seen]
        seen.update(paragraphs)
        if any(_is_prose(paragraph) for paragraph in paragraphs):
            documents[name] = "\n\n".join(paragraphs)
    return dict(sorted(documents.items()))


def _paragraphs(text: str) -> Iterator[str]:
    """Yield headings and prose paragraphs of one topic, each on one line, in order."""
    headings = {match.group(1) for match in _HEADING.finditer(text)}
    text = _HEADING.sub(r"\n\1\n", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*[*•] )", text):
        if _CODE.search(block):
            continue
        lines = [line.strip() for line in block.strip("\n").splitlines()]
        paragraph = _LIST_MARKER.sub("", " ".join(lines))
        paragraph = re.sub(r"(?<=[a-z]-) (?=[a-z])(?!and |or )", "", paragraph)  # words cut at a hyphen by line filling
        paragraph = _EMPHASIS.sub(r"\1", _FOOTNOTE_MARK.sub("", paragraph))
        paragraph = re.sub(r"\s+", " ", paragraph).strip()
        if block.strip() in headings or _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    """Return whether a paragraph reads as English: it ends as a sentence does, and a tenth of it is no Python word."""
    count = len(paragraph.split())
    return count >= 5 and paragraph[-1] in ".:?!)”" and 10 * len(_ENGLISH_WORD.findall(paragraph)) >= count


def _questioned_paragraphs(title: str, document: str) -> list[dict[str, Any]]:
    """Return the contexts of one document that have questions, in the SQuAD structure."""
    paragraphs = []
    for index, context in enumerate(_contexts(document)):
        qas = [
            {
                "id": f"{title}-{index}-{number}",
                "question": question,
                "answers": [{"text": context[start:end], "answer_start": start}],
            }
            for number, (question, start, end) in enumerate(_questions(context))
        ]
        if qas:
            paragraphs.append({"context": context, "qas": qas})
    return paragraphs


def _contexts(document: str) -> Iterator[str]:
    """Yield runs of paragraphs of at most ``CONTEXT_WORDS`` words; a longer paragraph is a context of its own."""
    run: list[str] = []
    for paragraph in filter(_is_prose, document.split("\n\n")):
        if run and sum(len(part.split()) for part in [*run, paragraph]) > CONTEXT_WORDS:
            yield " ".join(run)
            run = []
        run.append(paragraph)
    if run:
        yield " ".join(run)


def _questions(context: str) -> Iterator[tuple[str, int, int]]:
    """Yield question, start and end of its answer in ``context``, for every sentence that fits a template."""
    position = 0
    for sentence in _SENTENCE_END.split(context):
        position = context.index(sentence, position)
        for question, start, end in _sentence_questions(sentence):
            if end > start and len(sentence[start:end].split()) <= MAX_ANSWER_WORDS:
                yield question, position + start, position + end
        position += len(sentence)


def _sentence_questions(sentence: str) -> Iterator[tuple[str, int, int]]:
    """Yield questions of one sentence: of what it says, then of its quoted terms one by one."""
    if match := _VERSION_NOTE.match(sentence):
        yield f"In which version: {match.group(2)}?", *match.span(1)
    elif match := _CONDITIONAL.match(sentence):
        yield f"What happens {match.group(1).lower()} {match.group(2)}?", *match.span(3)
    elif match := _STATEMENT.match(sentence):
        yield f"What does the {match.group(1)} do?", *match.span(2)
    elif match := _DESCRIPTION.match(sentence):
        yield f"What is said of {match.group(1)[0].lower()}{match.group(1)[1:]}?", *match.span(2)
    if len(sentence.split()) > MAX_CLOZE_WORDS:
        return
    for match in _QUOTED_TERM.finditer(sentence):
        if sentence.count(match.group(1)) == 1:
            blanked = f"{sentence[: match.start()]}___{sentence[match.end() :]}".rstrip(".:")
            yield f"Which {_kind(match.group(1))} is missing: {blanked}?", *match.span(1)


def _kind(term: str) -> str:
    """Return what the language calls a quoted term."""
    value = getattr(builtins, term, None)
    if isinstance(value, type) and issubclass(value, BaseException):
        return "exception"
    if term.startswith("__"):
        return "method" if term.endswith("()") else "attribute"
    if term.endswith("()"):
        return "function"
    return "keyword" if keyword.iskeyword(term) else "name"
