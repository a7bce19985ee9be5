"""WordPiece tokenizers, trained from texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import trainers
from transformers import BertTokenizer, PreTrainedTokenizerBase

from hf_fnl.tasks.tokenization import check_vocabulary
from hf_fnl.training.command_line import tracked

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_VOCAB_SIZE = 100
# As in the tokenizers library's own BERT recipe: rarer characters become [UNK].
MAX_ALPHABET = 1000


class Vocabulary(NamedTuple):
    """What pairing and masking need of a tokenizer; the arrays are indexed by token id."""

    cls_id: int
    sep_id: int
    mask_id: int
    is_special: NDArray[np.bool_]
    continues_word: NDArray[np.bool_]
    ordinary_ids: NDArray[np.int64]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Read a tokenizer's vocabulary.

        Raises:
            ValueError: If the tokenizer lacks a special token that BERT's pretraining needs.
        """
        for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}; pretraining needs a tokenizer in the manner of BERT's")
        vocab = tokenizer.get_vocab()
        is_special = np.zeros(max(vocab.values()) + 1, dtype=bool)
        is_special[tokenizer.all_special_ids] = True
        continues_word = np.zeros_like(is_special)
        continues_word[[index for token, index in vocab.items() if token.startswith("##")]] = True
        ordinary_ids = np.setdiff1d(np.fromiter(vocab.values(), np.int64), tokenizer.all_special_ids)
        special_ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)
        return cls(*special_ids, is_special, continues_word, ordinary_ids)


def train_wordpiece(
    texts: Iterable[str], *, vocab_size: int = 30522, lowercase: bool = True, min_frequency: int = 2
) -> BertTokenizer:
    """Train a BERT tokenizer; the same texts give the same vocabulary, in every process.

    Args:
        texts: Documents; read twice, so a list or a column of a data set (``documents["text"]``), not a generator.
        vocab_size: Entries wanted, special tokens included; a small corpus may give fewer.
        lowercase: Lower-case the text and strip accents, as the uncased BERT does.
        min_frequency: How often two pieces must stand together to become one.

    Returns:
        A tokenizer whose vocabulary begins with ``[PAD]``, ``[UNK]``, ``[CLS]``, ``[SEP]``, ``[MASK]``.

    Raises:
        TypeError: If ``texts`` is a string or can be read only once.
        ValueError: If there is no text, or ``vocab_size`` or ``min_frequency`` is too small.
    """
    if isinstance(texts, str) or iter(texts) is texts:
        raise TypeError(f"texts is read twice: give a list or a data set's column, not a {type(texts).__name__}")
    check_vocabulary(vocab_size, min_frequency, smallest=MIN_VOCAB_SIZE)
    untrained = BertTokenizer(do_lower_case=lowercase)
    # At most half of the entries are single characters, which come in an initial and a continuing form.
    alphabet = _alphabet(texts, untrained, min(MAX_ALPHABET, (vocab_size - len(SPECIAL_TOKENS)) // 4))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        # Ids given here are fixed. The trainer numbers what it meets in hash order, and ids decide ties of merges.
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *(f"##{char}" for char in alphabet if _continues(char, untrained))],
        show_progress=False,
    )
    untrained.backend_tokenizer.train_from_iterator(tracked(texts, "training the tokenizer"), trainer)
    vocab = sorted(untrained.backend_tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return BertTokenizer(vocab=dict(vocab), do_lower_case=lowercase)


def _alphabet(texts: Iterable[str], tokenizer: BertTokenizer, limit: int) -> list[str]:
    """The most frequent characters after normalisation, at most ``limit``, in code point order."""
    raw: Counter[str] = Counter()
    for text in tracked(texts, "counting characters"):
        raw.update(text)
    counts: Counter[str] = Counter()
    for char, count in raw.items():
        for normal in "".join(_words(char, tokenizer)):
            counts[normal] += count
    if not counts:
        raise ValueError("no text to train a tokenizer on")
    return sorted(sorted(counts, key=lambda char: (-counts[char], char))[:limit])


def _continues(char: str, tokenizer: BertTokenizer) -> bool:
    return len(_words(f"a{char}", tokenizer)) == 1


def _words(text: str, tokenizer: BertTokenizer) -> list[str]:
    backend = tokenizer.backend_tokenizer
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]
