"""Pretraining examples: masks, data sets, streams and batches; nothing about them depends on who reads them when."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForPreTraining,
    DataCollatorForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.pretraining import DOCUMENTS_PER_GROUP, build_pretraining_dataset
from hf_fnl.tasks.pretraining_examples import PretrainingOptions, Vocabulary, mask_tokens
from hf_fnl.tasks.sentences import tokenize_documents
from hf_fnl.tasks.tokenization import train_wordpiece
from hf_fnl.training import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.training.callbacks import EpochCallback

CORPUS = embedded_documents()
FULL = PretrainingOptions(short_sequence_probability=0.0)
CLS, SEP, MASK, FIRST_ID = 1, 2, 3, 5


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(CORPUS[:20], vocab_size=400)


@pytest.fixture(scope="module")
def documents():
    return datasets.Dataset.from_dict({"text": CORPUS[:20]})


def original_ids(examples: Iterable[dict]) -> list[list[int]]:
    return [torch.where(e["labels"] == -100, e["input_ids"], e["labels"]).tolist() for e in examples]


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Masks


def vocabulary(size: int = 1000) -> Vocabulary:
    is_special = np.zeros(size, dtype=bool)
    is_special[:FIRST_ID] = True
    return Vocabulary(CLS, SEP, MASK, is_special, np.arange(FIRST_ID, size))


def example_ids(rng: np.random.Generator, length: int) -> np.ndarray:
    ids = rng.integers(FIRST_ID, 1000, length)
    ids[[0, length // 2, -1]] = CLS, SEP, SEP
    return ids


def test_labels_are_the_original_tokens_and_nothing_else_changes():
    words = vocabulary()
    for seed in range(50):
        ids = example_ids(generator(seed), 101)
        before = ids.copy()
        masked, labels = mask_tokens(ids, FULL, words, generator(seed))
        chosen = labels != -100
        np.testing.assert_array_equal(ids, before)
        np.testing.assert_array_equal(labels[chosen], ids[chosen])
        np.testing.assert_array_equal(masked[~chosen], ids[~chosen])
        assert not words.is_special[ids[chosen]].any()
        assert set(masked[chosen]) <= {MASK, *words.ordinary_ids}


@pytest.mark.parametrize(
    ("length", "probability", "count"), [(128, 0.15, 19), (10, 0.15, 2), (8, 0.05, 1), (64, 0.4, 26), (8, 0.99, 5)]
)
def test_the_number_of_masked_tokens_is_exact(length, probability, count):
    options = replace(FULL, mlm_probability=probability)
    _, labels = mask_tokens(example_ids(generator(), length), options, vocabulary(), generator())
    assert (labels != -100).sum() == count


def test_of_ten_eight_are_masked_one_is_random_and_one_is_kept():
    ids, rng = example_ids(generator(), 20_000), generator(1)
    masked, labels = mask_tokens(ids, replace(FULL, mlm_probability=0.5), vocabulary(), rng)
    chosen = labels != -100
    assert chosen.sum() == 10_000
    assert (masked[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (masked[chosen] == ids[chosen]).mean() == pytest.approx(0.1, abs=0.02)
    random = masked[chosen & (masked != MASK) & (masked != ids)]
    assert random.min() >= FIRST_ID
    assert len(set(random)) > 500


def test_nothing_is_masked_where_all_is_special():
    ids = np.array([CLS, 4, 4, SEP])
    masked, labels = mask_tokens(ids, FULL, vocabulary(), generator())
    assert (masked.tolist(), set(labels)) == (ids.tolist(), {-100})


# Data sets


@pytest.mark.parametrize("next_sentence", [True, False], ids=["pairs", "packed"])
def test_an_example_is_a_function_of_seed_epoch_and_index(documents, tokenizer, next_sentence):
    options = PretrainingOptions(next_sentence=next_sentence, max_seq_length=64)
    dataset, again = (build_pretraining_dataset(documents, tokenizer, options) for _ in range(2))
    first = list(dataset)
    dataset.set_epoch(3)
    long = [index for index, example in enumerate(first) if len(example["input_ids"]) > 24]
    assert not any(equal(dataset[index], first[index]) for index in long)
    dataset.set_epoch(0)
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    order = torch.randperm(len(dataset)).tolist()
    for index, example in zip(order, again.__getitems__(order), strict=True):
        assert equal(example, first[index])
        assert len(example["input_ids"]) <= 64


def test_labels_restore_the_text(documents, tokenizer):
    dataset = build_pretraining_dataset(documents, tokenizer, replace(FULL, next_sentence=False, max_seq_length=32))
    restored = [token for ids in original_ids(dataset) for token in ids[1:-1] if token != tokenizer.sep_token_id]
    corpus = [document.tokens for document in tokenize_documents(documents["text"], tokenizer)]
    assert restored == np.concatenate(corpus).tolist()


def test_a_pair_is_typed_as_the_tokenizer_types_it(documents, tokenizer):
    dataset = build_pretraining_dataset(documents, tokenizer, FULL)
    for example in dataset:
        second = (example["input_ids"] == tokenizer.sep_token_id).cumsum(0).roll(1)
        second[0] = 0
        assert torch.equal(example["token_type_ids"], second)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_examples_do_not_depend_on_the_number_of_processes(documents, tokenizer):
    one, two = (build_pretraining_dataset(documents, tokenizer, FULL, num_proc=number) for number in (None, 2))
    assert len(one) == len(two)
    assert all(equal(one[index], two[index]) for index in range(len(one)))


def loader(dataset, tokenizer, **options):
    return DataLoader(dataset, batch_size=4, collate_fn=DataCollatorForTokenClassification(tokenizer), **options)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_persistent_workers_see_the_epoch(documents, tokenizer):
    dataset = build_pretraining_dataset(documents.select(range(5)), tokenizer, FULL)
    workers = loader(dataset, tokenizer, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert all(map(equal, workers, loader(dataset, tokenizer)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_all_evaluations_mask_alike_whoever_makes_the_batches(documents, tokenizer, tmp_path):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "remove_unused_columns": False}
    trainer = FLAMBeTrainer(
        torch.nn.Linear(1, 1),
        FLAMBeTrainingArguments(str(tmp_path), optim="lamb", use_cpu=True, **workers),
        eval_dataset=build_pretraining_dataset(documents.select(range(5)), tokenizer, FULL),
        data_collator=DataCollatorForTokenClassification(tokenizer),
    )
    first, second = (list(trainer.get_eval_dataloader()) for _ in range(2))
    assert all(map(equal, first, second))


# Streams


def counted(count: int, read: list):
    for number in range(count):
        read.append(number)
        yield {"text": f"{CORPUS[number % 20][:200]} End of {number}."}


def stream_of(count: int, read: list | None = None) -> datasets.IterableDataset:
    return datasets.IterableDataset.from_generator(
        counted, gen_kwargs={"count": count, "read": [] if read is None else read}
    )


@pytest.mark.parametrize("next_sentence", [True, False], ids=["pairs", "packed"])
def test_a_stream_is_a_function_of_the_seed(tokenizer, next_sentence):
    options = PretrainingOptions(next_sentence=next_sentence)
    first, again, other = (
        list(build_pretraining_dataset(stream_of(30), tokenizer, replace(options, seed=seed))) for seed in (1, 1, 2)
    )
    assert all(equal(*pair) for pair in zip(again, first, strict=True))
    assert not any(map(equal, other, first))


def test_no_two_groups_of_a_stream_get_the_same_masks(tokenizer):
    once = datasets.Dataset.from_dict({"text": [f"Document {n} of some." for n in range(DOCUMENTS_PER_GROUP)]})
    dataset = build_pretraining_dataset(
        once.to_iterable_dataset().repeat(2), tokenizer, replace(FULL, next_sentence=False)
    )
    examples = list(dataset)
    half = len(examples) // 2
    assert sorted(original_ids(examples[:half])) == sorted(original_ids(examples[half:]))
    assert not any(map(equal, examples[:half], examples[half:]))


def test_a_stream_holds_what_a_stored_data_set_holds(documents, tokenizer):
    options = replace(FULL, next_sentence=False, max_seq_length=32)
    stored = build_pretraining_dataset(documents, tokenizer, options)
    streamed = build_pretraining_dataset(documents.to_iterable_dataset(), tokenizer, options)
    assert sorted(original_ids(streamed)) == sorted(original_ids(stored))


def test_a_stream_masks_and_pairs_as_a_stored_data_set_does(documents, tokenizer):
    streamed = list(build_pretraining_dataset(documents.to_iterable_dataset(), tokenizer, FULL))
    labels = torch.cat([example["labels"] for example in streamed])
    counts = [(e["labels"] != -100).sum() == FULL.num_masked(len(e["labels"])) for e in streamed]
    masked = torch.cat([example["input_ids"] for example in streamed])[labels != -100] == tokenizer.mask_token_id
    assert all(counts)
    assert masked.float().mean() == pytest.approx(0.8, abs=0.03)
    assert torch.stack([e["next_sentence_label"] for e in streamed]).float().mean() == pytest.approx(0.55, abs=0.15)


def test_a_stream_is_read_one_group_ahead_at_most(tokenizer):
    read: list[int] = []
    dataset = build_pretraining_dataset(stream_of(5 * DOCUMENTS_PER_GROUP, read), tokenizer, FULL)
    assert len(read) <= 3
    read.clear()
    list(islice(dataset, 10))
    assert len(read) <= DOCUMENTS_PER_GROUP + 1


# Under a Trainer


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self.step


def train(folder, dataset, tokenizer, stop: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=7,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = Trainer(
        BertForPreTraining(config),
        arguments,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        train_dataset=dataset,
        callbacks=[EpochCallback(), *([StopAt(stop)] if stop else [])],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model.state_dict()


@pytest.mark.parametrize("stop", [3, 5], ids=["between epochs", "second epoch"])
def test_resuming_equals_never_having_stopped(tmp_path, tokenizer, stop):
    """Twelve examples make three steps an epoch, so that the run crosses into its third."""
    small = datasets.Dataset.from_dict({"text": [text[:400] for text in CORPUS[:10]]})

    def dataset():
        examples = build_pretraining_dataset(small, tokenizer, FULL)
        examples.instances = examples.instances.select(range(12))
        return examples

    whole = train(tmp_path / "whole", dataset(), tokenizer)
    train(tmp_path / "parts", dataset(), tokenizer, stop=stop)
    resumed = train(tmp_path / "parts", dataset(), tokenizer, resume=True)
    assert equal(whole, resumed)


# What bad input gets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 7}, "max_seq_length must be at least 8, got 7"),
        ({"short_sequence_probability": 1.5}, r"short_sequence_probability must be in \[0, 1\], got 1.5"),
        ({"mlm_probability": 0.0}, r"mlm_probability must be in \(0, 1\), got 0.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainingOptions(**options)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["Only one. Document."]}, {}, "next_sentence=True needs two documents with text at least, got 1"),
        ({"body": ["One.", "Two."]}, {}, r"need a column 'text', they have \['body'\]"),
        ({"text": ["One.", "Two."]}, {"max_seq_length": 65}, "max_seq_length is 65, above the tokenizer's limit of 64"),
    ],
    ids=["one document", "no text column", "too long"],
)
def test_bad_documents_are_refused_at_once(tokenizer, monkeypatch, streaming, columns, options, message):
    monkeypatch.setattr(tokenizer, "model_max_length", 64)
    documents = datasets.Dataset.from_dict(columns)
    with pytest.raises(ValueError, match=message):
        build_pretraining_dataset(
            documents.to_iterable_dataset() if streaming else documents,
            tokenizer,
            PretrainingOptions(**{"max_seq_length": 64, **options}),
        )


@pytest.mark.parametrize("documents", [datasets.Dataset.from_dict({"text": []}), stream_of(0)], ids=["map", "stream"])
def test_no_documents_are_refused_at_once(tokenizer, documents):
    with pytest.raises(ValueError, match="no document with text"):
        build_pretraining_dataset(documents, tokenizer, FULL)


def test_documents_without_text_are_refused(tokenizer):
    documents = datasets.Dataset.from_dict({"text": [" ", "\n", ""]})
    with pytest.raises(ValueError, match="no document with text"):
        build_pretraining_dataset(documents, tokenizer, FULL)
