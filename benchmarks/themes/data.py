"""How fast examples of BERT's pretraining are prepared, beside Transformers' collator and the tokenizer alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import cycle
from typing import Any

import numpy as np
import torch

from benchmarks.harness.steps import check_close
from benchmarks.harness.theme import Options, Theme
from benchmarks.harness.timing import Case, Comparison, Goal, Row

# What BERT-base with a third of its encoder's parameters is trained on in a second by one H200, about.
NEEDED = 5000


def rounds(options: Options) -> int:
    """That are timed."""
    return options.pick(full=11, quick=3, tiny=2)


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless a padded batch holds the tokens and labels of its examples."""
    from transformers import DataCollatorForTokenClassification

    from hf_fnl.tasks.pretraining import build_pretraining_dataset
    from hf_fnl.tasks.pretraining_examples import PretrainingOptions

    documents, tokenizer = _documents(options)
    stored = build_pretraining_dataset(documents, tokenizer, PretrainingOptions())
    examples = stored.__getitems__([0, len(stored) - 1])
    batch = DataCollatorForTokenClassification(tokenizer)(examples)
    is_token = batch["attention_mask"].bool()
    names = ("input_ids", "labels")
    expected = [torch.cat([each[name] for each in examples]).float() for name in names]
    check_close("padded", [batch[name][is_token].float() for name in names], expected, 1e-9)


def measure(options: Options) -> Iterator[Row]:
    """On a CPU, whatever the device: examples a second of one process, with what they cannot be faster than."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification

    from hf_fnl.tasks.pretraining import build_pretraining_dataset
    from hf_fnl.tasks.pretraining_examples import PretrainingOptions

    documents, tokenizer = _documents(options)
    stored = build_pretraining_dataset(documents, tokenizer, PretrainingOptions())
    count = min(len(stored), 128)
    rng = np.random.default_rng(0)
    upcoming = cycle([rng.permutation(len(stored))[:count].tolist() for _ in range(rounds(options) + 2)])
    padded = DataCollatorForTokenClassification(tokenizer)
    theirs = DataCollatorForLanguageModeling(tokenizer, seed=0)

    def transformers_way() -> object:
        return theirs([{"input_ids": ids.tolist()} for ids in stored.instances[next(upcoming)]["input_ids"]])

    cases: dict[str, Case] = {
        "Transformers' masking collator": transformers_way,
        "read only": lambda: stored.instances[next(upcoming)],
        "masked, padded": lambda: padded(stored.__getitems__(next(upcoming))),
    }
    yield from _rates(Comparison(f"batch of {count} stored examples", cases, "masked, padded"), count, options)
    yield from _from_text(options, documents, tokenizer)


def _from_text(options: Options, documents: Any, tokenizer: Any) -> Iterator[Row]:
    """What a stream does for each group of documents; most of it is the tokenizer's own work."""
    from hf_fnl.tasks.pretraining_examples import PretrainingOptions, Vocabulary, make_instances
    from hf_fnl.tasks.sentences import split_sentences, tokenize_documents

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a data loader's worker
    texts = documents["text"][:64]
    sentences = [sentence for text in texts for sentence in split_sentences(text)]
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    tokenized = tokenize_documents(texts, tokenizer)
    pair = partial(make_instances, tokenized, PretrainingOptions(), vocabulary)
    count = len(pair(np.random.default_rng(0)))
    alone, ours = "tokenizer", "sentences, tokens"
    cases: dict[str, Case] = {
        alone: lambda: tokenizer(sentences, add_special_tokens=False),
        ours: lambda: tokenize_documents(texts, tokenizer),
        "pairs": lambda: pair(np.random.default_rng(0)),
    }
    goals = {ours: Goal(alone, slower=1.3)}
    yield from _rates(Comparison(f"{len(texts)} documents", cases, alone, goals=goals), count, options)


def _rates(comparison: Comparison, examples: int, options: Options) -> Iterator[Row]:
    for row in comparison.measure("cpu", rounds=rounds(options)):
        rate = examples / row["milliseconds"] * 1e3
        yield {**row, "examples_per_second": rate, "workers_needed": NEEDED / rate}


@lru_cache
def _documents(options: Options) -> tuple[Any, Any]:
    """English text that is always there, and a tokenizer for it."""
    import datasets

    from hf_fnl.tasks.embedded import embedded_documents
    from hf_fnl.tasks.tokenization import train_wordpiece

    datasets.disable_progress_bars()
    texts = embedded_documents()[: options.pick(full=200, quick=100, tiny=8)]
    tokenizer = train_wordpiece(texts, vocab_size=options.pick(full=8000, quick=4000, tiny=300))
    return datasets.Dataset.from_dict({"text": texts}), tokenizer


THEME = Theme("data", check, measure)
