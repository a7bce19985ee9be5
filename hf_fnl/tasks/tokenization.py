"""Tokenizers, loaded from wherever they lie."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from hf_fnl.tasks.documents import looks_like_path
from hf_fnl.utils.hub import check_source


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        source: An id on the Hub; a folder that ``save_pretrained`` wrote; a folder with only GPT-2's ``vocab.json`` and
            ``merges.txt``; or one with only BERT's ``vocab.txt``, read as cased when an entry has a capital letter.

    Returns:
        The tokenizer.

    Raises:
        FileNotFoundError: If the folder does not exist or holds no tokenizer, or the Hub has none of this name.
        ValueError: If the tokenizer needs code of its own, which is not run.
    """
    folder = Path(source).expanduser()
    if isinstance(source, str) and not looks_like_path(source):
        check_source(source)
        return _auto_tokenizer(source)
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {folder}")

    def holds(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    if holds("tokenizer.json") or holds("tokenizer_config.json"):
        return _auto_tokenizer(folder)
    if holds("vocab.json", "merges.txt"):
        return GPT2Tokenizer.from_pretrained(folder)
    if not holds("vocab.txt"):
        needed = "tokenizer.json, tokenizer_config.json, vocab.json with merges.txt, or vocab.txt"
        raise FileNotFoundError(f"no {needed} in {folder}")
    entries = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    cased = any(entry != entry.lower() for entry in entries if not entry.startswith("["))
    return BertTokenizer.from_pretrained(folder, do_lower_case=not cased)


def _auto_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the tokenizer of {source} needs code of its own, and hf_fnl runs none that it finds in a model's folder"
        ) from error


def check_vocabulary(vocab_size: int, min_frequency: int, *, smallest: int) -> None:
    """Raise a ``ValueError`` unless a tokenizer can be trained to this size of vocabulary and frequency of pairs."""
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, got {vocab_size}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency must be at least 1, got {min_frequency}")
