"""Byte-pair encodings over both languages of a translation task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_fnl.tasks.tokenization import check_vocabulary
from hf_fnl.training.command_line import tracked

EOS, PAD, UNK = SPECIAL_TOKENS = ("</s>", "<pad>", "<unk>")
SPACE = "▁"
MIN_VOCAB_SIZE = 100
# As many characters as WordPiece keeps here; rarer ones become <unk>.
MAX_ALPHABET = 1000


def train_joint_bpe(
    sentences: Iterable[str], *, vocab_size: int = 10_000, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Train one byte-pair encoding (Sennrich et al. 2016) for the sentences of both languages.

    Every encoded text ends with ``</s>``; decoders start from ``<pad>``, as Marian's do. Decoding gives the text back,
    inner white space included, except for: a space at the beginning, the character U+2581, characters outside the
    vocabulary's alphabet, which become ``<unk>``, and the texts of special tokens.

    Args:
        sentences: Texts of both languages; read twice, so a list, not a generator.
        vocab_size: Entries wanted, special tokens included; little text may give fewer.
        min_frequency: How often two pieces must stand together to become one.

    Returns:
        The same tokenizer for the same sentences, in every process; its ids begin with ``</s>``, ``<pad>``, ``<unk>``.

    Raises:
        TypeError: If ``sentences`` is a string or can be read only once.
        ValueError: If there is no text, or ``vocab_size`` or ``min_frequency`` is too small.
    """
    if isinstance(sentences, str) or iter(sentences) is sentences:
        raise TypeError(f"sentences are read twice: give a list, not a {type(sentences).__name__}")
    check_vocabulary(vocab_size, min_frequency, smallest=MIN_VOCAB_SIZE)
    alphabet = _alphabet(sentences, min(MAX_ALPHABET, vocab_size // 2))
    backend = Tokenizer(models.BPE(unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    backend.decoder = decoders.Metaspace(SPACE)
    backend.train_from_iterator(
        tracked(sentences, "training the tokenizer"),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
    )
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


def _alphabet(sentences: Iterable[str], limit: int) -> list[str]:
    """The sign for a space and the most frequent characters, at most ``limit``, in code point order.

    Which of equally rare characters a trainer's own limit leaves out differs from run to run.
    """
    counts: Counter[str] = Counter()
    for sentence in tracked(sentences, "counting characters"):
        counts.update(sentence)
    counts.pop(" ", None)
    if not counts:
        raise ValueError("no text to train a tokenizer on")
    frequent = sorted(counts, key=lambda char: (-counts[char], char))
    return sorted({SPACE, *frequent[: limit - 1]})
