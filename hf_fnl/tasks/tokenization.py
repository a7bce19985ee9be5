"""Tokenizers, loaded from wherever they lie or trained from texts: WordPiece, byte-level BPE and joint BPE.

Where a trainer's vocabulary would differ from run to run, by the order in which it meets equally rare characters, the
alphabet is fixed here: the same texts give the same tokenizer in every process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_fnl.training.command_line import tracked
from hf_fnl.utils.hub import check_source

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
END_OF_TEXT = "<|endoftext|>"
EOS, PAD, UNK = "</s>", "<pad>", "<unk>"
SPACE = "▁"
MIN_VOCAB_SIZE = 100
MIN_FREQUENCY = 2  # how often two tokens must stand side by side to become one
MIN_BYTE_VOCAB_SIZE = 257  # every byte, and the end-of-text token
FILES = ("tokenizer.json", "tokenizer_config.json")
# As in the tokenizers library's own BERT recipe: rarer characters become [UNK].
MAX_ALPHABET = 1000


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or the folder holds no tokenizer.
        ValueError: If the tokenizer needs code of its own, which is not run.
    """
    check_source(source)
    if (folder := Path(source).expanduser()).exists():
        # Of a model without them Transformers makes a tokenizer that knows no words.
        if not any((folder / name).is_file() for name in FILES):
            raise FileNotFoundError(f"no {' or '.join(FILES)} in {folder}")
        source = folder
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the tokenizer of {source} needs code of its own, and hf_fnl runs none that it finds in a model's folder"
        ) from error


def train_wordpiece(texts: Iterable[str | None], *, vocab_size: int = 30522, lowercase: bool = True) -> BertTokenizer:
    """Train a BERT tokenizer, whose vocabulary begins with ``[PAD]``, ``[UNK]``, ``[CLS]``, ``[SEP]``, ``[MASK]``.

    Args:
        texts: Documents; read twice, so a list or a column of a data set (``documents["text"]``), not a generator.
        vocab_size: Entries wanted, special tokens included; a small corpus may give fewer.
        lowercase: Lower-case the text and strip accents, as the uncased BERT does.

    Raises:
        TypeError: If ``texts`` is a string or can be read only once.
        ValueError: If there is no text, or ``vocab_size`` is too small.
    """
    _check(texts, vocab_size, smallest=MIN_VOCAB_SIZE, twice=True)
    untrained = BertTokenizer(do_lower_case=lowercase)
    backend = untrained.backend_tokenizer

    def words(text: str) -> list[str]:
        return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))]

    # At most half of the entries are single characters, which come in an initial and a continuing form.
    limit = min(MAX_ALPHABET, (vocab_size - len(BERT_TOKENS)) // 4)
    alphabet = _alphabet(texts, limit, normal=lambda char: "".join(words(char)))
    continuing = [f"##{char}" for char in alphabet if len(words(f"a{char}")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        # Ids given here are fixed. The trainer numbers what it meets in hash order, and ids decide ties of merges.
        special_tokens=[*BERT_TOKENS, *alphabet, *continuing],
        show_progress=False,
    )
    backend.train_from_iterator(_not_empty(tracked(texts, "training the tokenizer")), trainer)
    vocab = sorted(backend.get_vocab().items(), key=lambda entry: entry[1])
    return BertTokenizer(vocab=dict(vocab), do_lower_case=lowercase)


def train_byte_bpe(texts: Iterable[str | None], *, vocab_size: int = 50257) -> GPT2Tokenizer:
    """Train a GPT-2 tokenizer, whose id 0 is ``<|endoftext|>``, with which documents begin and end.

    Any text can be encoded and decodes to itself, for every byte has an entry.

    Args:
        texts: Documents; read once.
        vocab_size: Entries wanted, ``<|endoftext|>`` and the 256 bytes included; a small corpus may give fewer.

    Raises:
        TypeError: If ``texts`` is a string.
        ValueError: If there is no text, or ``vocab_size`` is too small.
    """
    _check(texts, vocab_size, smallest=MIN_BYTE_VOCAB_SIZE)
    options = {"min_frequency": MIN_FREQUENCY, "show_progress": False}
    return GPT2Tokenizer().train_new_from_iterator(
        _not_empty(tracked(texts, "training the tokenizer")), vocab_size, **options
    )


def train_joint_bpe(sentences: Iterable[str], *, vocab_size: int = 10_000) -> PreTrainedTokenizerFast:
    """Train one byte-pair encoding (Sennrich et al. 2016) for the sentences of both languages of a translation task.

    Every encoded text ends with ``</s>``; decoders start from ``<pad>``, as Marian's do. Decoding gives the text back,
    inner white space included, except for: a space at the beginning, the character U+2581, characters outside the
    vocabulary's alphabet, which become ``<unk>``, and the texts of special tokens.

    Args:
        sentences: Texts of both languages; read twice, so a list, not a generator.
        vocab_size: Entries wanted, special tokens included; little text may give fewer.

    Returns:
        A tokenizer whose ids begin with ``</s>``, ``<pad>``, ``<unk>``.

    Raises:
        TypeError: If ``sentences`` is a string or can be read only once.
        ValueError: If there is no text, or ``vocab_size`` is too small.
    """
    _check(sentences, vocab_size, smallest=MIN_VOCAB_SIZE, twice=True)
    limit = min(MAX_ALPHABET, vocab_size // 2) - 1
    alphabet = sorted({SPACE, *_alphabet(sentences, limit, normal=lambda char: char.replace(" ", ""))})
    backend = Tokenizer(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    backend.decoder = decoders.Metaspace(SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[EOS, PAD, UNK],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(_not_empty(tracked(sentences, "training the tokenizer")), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, backend.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _check(texts: Iterable[str | None], vocab_size: int, *, smallest: int, twice: bool = False) -> None:
    if isinstance(texts, str):
        raise TypeError("texts must be several, such as a list or a data set's column; got a str")
    if twice and iter(texts) is texts:
        raise TypeError(f"texts are read twice: give a list or a data set's column, not a {type(texts).__name__}")
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, got {vocab_size}")


def _not_empty(texts: Iterable[str | None]) -> Iterator[str]:
    found = False
    for text in texts:
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise ValueError("no text to train a tokenizer on")


def _alphabet(texts: Iterable[str | None], limit: int, *, normal: Callable[[str], str]) -> list[str]:
    """Return the most frequent characters after normalization, at most ``limit``, in code point order."""
    raw: Counter[str] = Counter()
    for text in _not_empty(tracked(texts, "counting characters")):
        raw.update(text)
    counts: Counter[str] = Counter()
    for char, count in raw.items():
        for found in normal(char):
            counts[found] += count
    if not counts:
        raise ValueError("no text to train a tokenizer on")
    return sorted(sorted(counts, key=lambda char: (-counts[char], char))[:limit])
