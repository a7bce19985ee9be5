"""Byte-level byte-pair encodings as GPT-2 has them, trained from texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import GPT2Tokenizer

from hf_fnl.tasks.tokenization import check_vocabulary
from hf_fnl.training.command_line import tracked

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and the end-of-text token


def train_byte_bpe(texts: Iterable[str | None], *, vocab_size: int = 50257, min_frequency: int = 2) -> GPT2Tokenizer:
    """Train a GPT-2 tokenizer; the same texts give the same vocabulary, in every process.

    Any text can be encoded and comes back whole, for every byte has an entry.

    Args:
        texts: Documents; read once.
        vocab_size: Entries wanted, ``<|endoftext|>`` and the 256 bytes included; a small corpus may give fewer.
        min_frequency: How often two pieces must stand together to become one.

    Returns:
        A tokenizer whose id 0 is ``<|endoftext|>``, with which documents begin and end.

    Raises:
        TypeError: If ``texts`` is a string.
        ValueError: If there is no text, or ``vocab_size`` or ``min_frequency`` is too small.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several, such as a list or a data set's column; got a str")
    check_vocabulary(vocab_size, min_frequency, smallest=MIN_VOCAB_SIZE)
    options = {"min_frequency": min_frequency, "show_progress": False}
    return GPT2Tokenizer().train_new_from_iterator(
        _not_empty(tracked(texts, "training the tokenizer")), vocab_size, **options
    )


def _not_empty(texts: Iterable[str | None]) -> Iterator[str]:
    found = False
    for text in texts:
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise ValueError("no text to train a tokenizer on")
