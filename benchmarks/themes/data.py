"""Packed batches against padded ones on the lengths of real examples; how fast examples are prepared beside a step."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from benchmarks.house.steps import Contender, Steps, check_close, seconds_at_least
from benchmarks.house.sweeps import Sweep, time_sweep
from benchmarks.house.theme import Options, Theme
from benchmarks.house.timing import Case, Comparison, Goal, Row
from hf_fnl import FactorizedBertConfig, FactorizedBertForPreTraining, FactorizedBertForQuestionAnswering
from hf_fnl.training.packing import PackingCollator

PADDED, PACKED, LONG_ROWS = "padded", "packed", "packed, rows of twice the length"
PAD = 0
# Every twentieth of the tokens of: 6,094 SQuAD 1.1 windows of up to 384 tokens with stride 128; 17,759 and 5,894
# sentence pairs of Wikipedia articles, made as BERT's are, of up to 128 and 512. Vocabulary of bert-base-uncased.
LENGTHS = {
    "question answering, 384": (
        (41, 77, 95, 105, 115, 122, 130, 137, 145, 153, 161, 171, 179, 188, 200, 211, 230, 247, 268, 311, 384)
    ),
    "pretraining, 128": (5, 53, 68, 88, *[128] * 17),
    "pretraining, 512": (5, 53, 67, 87, 130, 234, 300, 391, *[512] * 13),
}
SHARE_OF_SAVED = 0.85  # of the tokens that are saved, of which the time is to fall by as much
TOLERANCE = 1e-4
# What BERT-base with a third of its encoder's parameters is trained on in a second by one H200, about.
NEEDED = 5000
BASE = {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 192}
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
SMALL |= {"qk_rank": 32, "ov_rank": 32, "ffn_rank": 96, "vocab_size": 8000}
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}

Examples = list[dict[str, Tensor]]


def draw(workload: str, count: int, vocabulary: int, rng: np.random.Generator) -> Examples:
    """Random examples whose lengths are distributed as those of real ones."""
    shares = np.linspace(0, 1, len(LENGTHS[workload]))
    lengths = np.interp(rng.random(count), shares, LENGTHS[workload]).astype(int)
    make = _window if workload.startswith("question") else _pair
    return [make(int(length), vocabulary, rng) for length in lengths]


def _tokens(length: int, vocabulary: int, rng: np.random.Generator) -> dict[str, Tensor]:
    ids = torch.from_numpy(rng.integers(1, vocabulary, length))
    return {"input_ids": ids, "token_type_ids": (torch.arange(length) >= length // 2).long()}


def _window(length: int, vocabulary: int, rng: np.random.Generator) -> dict[str, Tensor]:
    start, end = torch.from_numpy(np.sort(rng.integers(0, length, 2)))
    return {**_tokens(length, vocabulary, rng), "start_positions": start, "end_positions": end}


def _pair(length: int, vocabulary: int, rng: np.random.Generator) -> dict[str, Tensor]:
    tokens = _tokens(length, vocabulary, rng)
    labels = torch.full((length,), -100)
    chosen = torch.from_numpy(rng.permutation(length)[: max(1, round(0.15 * length))])
    labels[chosen] = tokens["input_ids"][chosen]
    return {**tokens, "labels": labels, "next_sentence_label": torch.tensor(int(rng.integers(2)))}


def pad(examples: Examples) -> dict[str, Tensor]:
    """A batch as Transformers' collators make it."""
    fillings = {"input_ids": PAD, "token_type_ids": 0, "labels": -100}
    batch = {"attention_mask": pad_sequence([torch.ones_like(each["input_ids"]) for each in examples], True)}
    for name in examples[0]:
        column = [example[name] for example in examples]
        batch[name] = pad_sequence(column, True, fillings[name]) if name in fillings else torch.stack(column)
    return batch


def collators(workload: str) -> dict[str, Any]:
    """What makes batches, by name."""
    longest = LENGTHS[workload][-1]
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD)
    return {
        PADDED: pad,
        PACKED: PackingCollator(tokenizer, longest),
        LONG_ROWS: PackingCollator(tokenizer, longest, 2 * longest),
    }


def on_device(batch: Mapping[str, Any], device: str) -> dict[str, Any]:
    """A batch with its tensors, those of ``packing`` too, on a device."""
    return {k: on_device(v, device) if isinstance(v, Mapping) else v.to(device) for k, v in batch.items()}


def build(workload: str, options: Options, **more: Any) -> PreTrainedModel:
    """The model that trains on these examples; how its factors were drawn does not matter to time."""
    kind = FactorizedBertForQuestionAnswering if workload.startswith("question") else FactorizedBertForPreTraining
    fields = options.pick(full=BASE if options.on_gpu else SMALL, quick=SMALL, tiny=TINY)
    config = FactorizedBertConfig(factor_init="default", max_position_embeddings=512, **{**fields, **more})
    return kind(config).to(options.device).train()


def steps_of(workload: str, options: Options, model: PreTrainedModel, *, count: int, batches: int) -> dict[str, Steps]:
    """The same examples in batches of every form, ``count`` in each."""
    rng = np.random.default_rng(0)
    made = [draw(workload, count, model.config.vocab_size, rng) for _ in range(batches)]
    dtype = torch.bfloat16 if options.on_gpu else None
    steps = {}
    for name, collate in collators(workload).items():
        formed = [on_device(collate(examples), options.device) for examples in made]
        tokens = sum(batch["input_ids"].numel() for batch in formed)
        steps[name] = Steps(f"{workload}, {count} examples", formed, tokens, options.device, dtype)
    return steps


def rounds(options: Options) -> int:
    """That are timed."""
    return options.pick(full=11, quick=3, tiny=2)


def check(options: Options) -> None:
    """Raise a ``RuntimeError`` unless packed batches give the loss and the gradients of padded ones."""
    workload = "pretraining, 128"
    model = build(workload, options, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    examples = draw(workload, 6, model.config.vocab_size, np.random.default_rng(1))
    found = {}
    for name, collate in collators(workload).items():
        model.zero_grad()
        loss = model(**on_device(collate(examples), options.device)).loss
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.ndim > 1]
        found[name] = [loss.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]
    for name in (PACKED, LONG_ROWS):
        check_close(name, found[name], found[PADDED], TOLERANCE)


def measure(options: Options) -> Iterator[Row]:
    """Steps on padded and packed batches; then every part of the way from text to a batch."""
    for workload in LENGTHS:
        yield from _steps(workload, options)
    try:
        yield from _preparation(options)
    except ImportError as error:
        yield {"workload": "examples", "case": "from text to a batch", "not_measured": str(error)}


def _steps(workload: str, options: Options) -> list[Row]:
    model = build(workload, options)
    count = options.pick(full=64 if options.on_gpu else 16, quick=8, tiny=4)
    steps = steps_of(workload, options, model, count=count, batches=rounds(options) + 2)
    tokens = {name: each.tokens for name, each in steps.items()}
    saved = {name: 1 - tokens[name] / tokens[PADDED] for name in steps}
    facts = {name: {"tokens": tokens[name] // len(steps[name].batches), "tokens_saved": saved[name]} for name in steps}
    return Comparison(
        steps[PADDED].workload,
        {name: each.case(Contender(model)) for name, each in steps.items()},
        against=PADDED,
        limits={name: tokens[PADDED] / tokens[name] for name in steps},
        goals={PACKED: Goal(PADDED, slower=round(1 - SHARE_OF_SAVED * saved[PACKED], 3))},
        facts=facts,
    ).measure(options.device, rounds=rounds(options))


def _preparation(options: Options) -> Iterator[Row]:
    """On a CPU, whatever the device: examples a second of one process, with what they cannot be faster than."""
    from transformers import DataCollatorForLanguageModeling

    from hf_fnl.tasks.pretraining import PretrainingCollator, build_pretraining_dataset
    from hf_fnl.tasks.pretraining_examples import PretrainingOptions

    documents, tokenizer = _documents(options)
    words = build_pretraining_dataset(documents, tokenizer, PretrainingOptions(whole_word_mask=True))
    stored = build_pretraining_dataset(documents, tokenizer, PretrainingOptions())
    count = min(len(stored), 128)
    rng = np.random.default_rng(0)
    upcoming = cycle([rng.permutation(len(stored))[:count].tolist() for _ in range(rounds(options) + 2)])
    padded, packed = PretrainingCollator(tokenizer), PackingCollator(tokenizer, 128)
    theirs = DataCollatorForLanguageModeling(tokenizer, seed=0)

    def transformers_way() -> object:
        return theirs([{"input_ids": ids.tolist()} for ids in stored.instances[next(upcoming)]["input_ids"]])

    cases: dict[str, Case] = {
        "Transformers' masking collator": transformers_way,
        "read only": lambda: stored.instances[next(upcoming)],
        "masked, padded": lambda: padded(stored.__getitems__(next(upcoming))),
        "masked, packed": lambda: packed(stored.__getitems__(next(upcoming))),
        "whole words, padded": lambda: padded(words.__getitems__(next(upcoming))),
    }
    yield from _rates(Comparison(f"batch of {count} stored examples", cases, "masked, padded"), count, options)
    yield from _from_text(options, documents, tokenizer)


def _from_text(options: Options, documents: Any, tokenizer: Any) -> Iterator[Row]:
    """What a stream does for each group of documents; most of it is the tokenizer's own work."""
    from hf_fnl.tasks.documents import split_sentences, tokenize_documents
    from hf_fnl.tasks.pretraining_examples import PretrainingOptions, Vocabulary, make_instances

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in a data loader's worker
    texts = documents["text"][:64]
    sentences = [sentence for text in texts for sentence in split_sentences(text)]
    vocabulary, backend = Vocabulary.from_tokenizer(tokenizer), tokenizer.backend_tokenizer
    tokenized = tokenize_documents(texts, tokenizer)
    pair = partial(make_instances, tokenized, PretrainingOptions(), vocabulary)
    count = len(pair(np.random.default_rng(0)))
    alone, ours = "tokenizer alone", "sentences, tokens"
    cases: dict[str, Case] = {
        alone: lambda: backend.encode_batch_fast(sentences, add_special_tokens=False),
        "tokenizer as called": lambda: tokenizer(sentences, add_special_tokens=False),
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


def sweeps(options: Options) -> Iterator[Sweep]:
    """Examples in a batch, of which few leave more room in rows unused; and workers."""
    workload = "question answering, 384"
    model = build(workload, options)

    @lru_cache
    def made(count: int) -> dict[str, Steps]:
        return steps_of(workload, options, model, count=count, batches=1)

    on_cpu = options.pick(full=(2, 4, 8, 16), quick=(2, 4, 8), tiny=(1, 2, 3))
    yield time_sweep(
        "a step of question answering",
        "examples in a batch",
        (4, 8, 16, 32, 64, 128) if options.on_gpu and options.size != "tiny" else on_cpu,
        lambda count: {name: made(count)[name].case(Contender(model)) for name in (PADDED, PACKED)},
        lambda count: seconds_at_least(made(count)[PACKED], model),
        device=options.device,
        rounds=rounds(options),
        note="Rows fill up better in larger batches.",
    )
    if not options.on_gpu:
        with suppress(ImportError):  # of datasets; the rows say so
            yield _workers(options)


def _workers(options: Options) -> Sweep:
    from torch.utils.data import DataLoader

    from hf_fnl.tasks.pretraining import PretrainingCollator, build_pretraining_dataset
    from hf_fnl.tasks.pretraining_examples import PretrainingOptions

    documents, tokenizer = _documents(options)
    stored = build_pretraining_dataset(documents, tokenizer, PretrainingOptions())
    size, batches = min(64, len(stored)), options.pick(full=200, quick=40, tiny=3)
    rng = np.random.default_rng(0)
    sampler: Any = [rng.permutation(len(stored))[:size].tolist() for _ in range(batches)]

    def take(workers: int) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than there are cores
            collate = PretrainingCollator(tokenizer)
            for _ in DataLoader(stored, batch_sampler=sampler, num_workers=workers, collate_fn=collate):
                pass

    return time_sweep(
        f"{size * batches} stored examples, {os.cpu_count()} cores",
        "workers",
        options.pick(full=(1, 2, 4), quick=(1, 2, 3), tiny=(1, 2, 3)),
        lambda workers: {f"batches of {size}, workers started": lambda: take(workers)},
        lambda workers: {f"training on {NEEDED} a second": size * batches / NEEDED},
        device="cpu",
        rounds=options.pick(full=5, quick=3, tiny=1),
    )


THEME = Theme("data", check, measure, sweeps)
