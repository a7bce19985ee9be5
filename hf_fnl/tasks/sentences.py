"""Documents as sentences of token ids, of which BERT's pretraining examples are made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

# A stop closes a sentence unless it follows an initial ("J. Smith") or the text goes on in lower case ("e.g. this").
_STOP = r"""(?:(?<=[.!?])|(?<=[.!?]["')\]\u201d\u2019]))(?<!\b[A-Z]\.)\s+(?![a-zß-öø-ÿ])"""
_CHINESE_STOP = r"(?<=[\u3002\uff01\uff1f])"
_SENTENCE_END = re.compile(rf"\s*\n\s*|{_STOP}|{_CHINESE_STOP}")


class Document(NamedTuple):
    """Token ids of a document; its sentence ``i`` is ``tokens[bounds[i]:bounds[i + 1]]``."""

    tokens: NDArray[np.int32]
    bounds: NDArray[np.int64]


def split_sentences(text: str) -> list[str]:
    """Split a document into sentences.

    A sentence ends at a line break (so text with one sentence a line keeps its lines); at ``.``, ``!`` or ``?``, a
    closing quote or bracket after it or not, before white space that no lower-case letter follows; and at a Chinese or
    Japanese full stop, exclamation or question mark.

    Args:
        text: One document.

    Returns:
        The sentences in their order, without the white space between them and without empty ones.
    """
    return [sentence for piece in _SENTENCE_END.split(text) if (sentence := piece.strip())]


def tokenize_documents(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Split documents into sentences and these into token ids; documents without any token are left out."""
    sentences = [split_sentences(text or "") for text in texts]
    flat = list(chain.from_iterable(sentences))
    if not flat:
        return []
    only_ids = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    ids: list[list[int]] = tokenizer(flat, verbose=False, **only_ids)["input_ids"]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    bounds = np.concatenate([[0], lengths.cumsum()])
    tokens = np.fromiter(chain.from_iterable(ids), np.int32, bounds[-1])
    ends = np.cumsum([len(document) for document in sentences])
    spans = [bounds[end - len(document) : end + 1] for end, document in zip(ends, sentences, strict=True)]
    return [Document(tokens[span[0] : span[-1]], np.unique(span - span[0])) for span in spans if span[-1] > span[0]]
