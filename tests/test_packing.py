"""Packed batches: what a model computes from rows of several sequences is what it computes from each of them."""

import json
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import finetune_squad
import pretrain_bert
import pytest
import torch
from bert_cases import HEADS, LOW, NO_DROPOUT, SIZES
from family import gradients, random_vectors_, run
from launching import launch
from torch import Tensor
from torch.nn import functional as F
from training_cases import tiny_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_fnl import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.tasks.arguments import TextTrainingArguments, default_workers
from hf_fnl.tasks.pretraining import PretrainingCollator
from hf_fnl.training.packing import PackingCollator, first_fit
from hf_fnl.training.stream_loader import StreamLoader
from hf_fnl.training.streaming import ShardedStream

ROOT = Path(__file__).parents[1]
PAD = 9
TOKENIZER = SimpleNamespace(pad_token_id=PAD)
LENGTHS = (11, 3, 7, 2, 5, 11, 4)
LONGEST = 13
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def examples(lengths=LENGTHS, vocab_size: int = SIZES["vocab_size"]) -> list[dict[str, Tensor]]:
    """Pretraining examples with different numbers of labels."""
    generator = torch.Generator().manual_seed(1)

    def example(number: int, length: int) -> dict[str, Tensor]:
        ids, types = (torch.randint(1, high, (length,), generator=generator) for high in (vocab_size, 2))
        labels = torch.full_like(ids, -100)
        labels[: 1 + number % 3] = ids[: 1 + number % 3]
        label = torch.tensor(number % 2)
        return {"input_ids": ids, "token_type_ids": types, "labels": labels, "next_sentence_label": label}

    return [example(number, length) for number, length in enumerate(lengths)]


def collators(width: int = LONGEST) -> tuple[PretrainingCollator, PackingCollator]:
    return PretrainingCollator(TOKENIZER, max_length=LONGEST), PackingCollator(TOKENIZER, LONGEST, width)


def batches(width: int, **labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The examples padded to the longest that may be, and packed; with other labels where they are given."""
    padded, packed = (collate(examples()) for collate in collators(width))
    for batch in (padded, packed):
        if labels:
            del batch["labels"], batch["next_sentence_label"]
            batch |= labels
    return padded, packed


def assert_same_results(model, padded, packed, real: Tensor) -> None:
    """Equal losses, gradients, and outputs at the tokens."""
    ours, theirs = model(**packed), model(**padded)
    torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
    assert len(ours) == len(theirs)
    for name in set(ours) - {"loss"}:
        left, right = ours[name].detach(), theirs[name].detach()
        if left.shape[:2] == real.shape:
            left, right = left[real], right[real]
        torch.testing.assert_close(left, right, msg=name, **CLOSE)
    torch.testing.assert_close(gradients(model, ours.loss), gradients(model, theirs.loss), **CLOSE)


# Collator


@pytest.mark.parametrize(
    ("lengths", "width", "starts", "rows"),
    [
        ([4, 6, 5, 5], 10, [6, 0, 10, 15], 2),
        ([3], 3, [0], 1),
        ([7, 7, 7], 13, [0, 13, 26], 3),
        ([1, 9, 2, 8], 10, [9, 0, 18, 10], 2),
    ],
    ids=["two each", "one", "none fits", "fills up"],
)
def test_examples_go_into_the_first_row_with_room_the_longest_first(lengths, width, starts, rows):
    assert first_fit(lengths, width) == (starts, rows)


@pytest.mark.parametrize("width", [13, 16, 50])
def test_no_token_is_lost_moved_or_used_twice(width):
    batch = PackingCollator(TOKENIZER, LONGEST, width)(examples())
    packing = batch["packing"]
    is_token = torch.arange(LONGEST) < packing["lengths"][:, None]
    assert packing["lengths"].tolist() == list(LENGTHS)
    for name in ("input_ids", "token_type_ids"):
        taken = batch[name].flatten()[packing["index"]][is_token]
        assert torch.equal(taken, torch.cat([example[name] for example in examples()]))
    assert torch.equal(
        batch["position_ids"].flatten()[packing["index"]][is_token], torch.cat([*map(torch.arange, LENGTHS)])
    )
    owners = packing["sequence_ids"].flatten()[packing["index"]]
    assert torch.equal(owners[is_token], torch.repeat_interleave(torch.tensor(LENGTHS)))
    unused = packing["sequence_ids"] == -1
    assert unused.sum() == unused.numel() - sum(LENGTHS)
    assert (batch["input_ids"][unused] == PAD).all()


@pytest.mark.parametrize("width", [13, 16, 50])
def test_bounds_part_the_tokens_as_the_numbers_of_the_sequences_do(width):
    packing = PackingCollator(TOKENIZER, LONGEST, width)(examples())["packing"]
    ids, bounds = packing["sequence_ids"], packing["bounds"].long()
    assert packing["bounds"].dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == ids.numel()
    rows = torch.arange(len(ids))[:, None].expand_as(ids)
    changes = (ids.flatten().diff() != 0) | (rows.flatten().diff() != 0)
    assert set(bounds.tolist()) == {0, ids.numel(), *(changes.nonzero().flatten() + 1).tolist()}


def test_labels_and_the_batch_are_those_of_padded_batches():
    padded, packed = batches(16)
    assert torch.equal(packed["labels"], padded["labels"])
    assert torch.equal(packed["next_sentence_label"], padded["next_sentence_label"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackingCollator(TOKENIZER, 13, 12), "packed_length must be at least 13, .* got 12"),
        (lambda: PackingCollator(TOKENIZER, 10)(examples()), "an example has 11 tokens, more than max_length=10"),
        (lambda: first_fit([4, 12], 11), "an example has 12 tokens, more than packed_length=11"),
    ],
    ids=["row too short", "example too long", "first fit"],
)
def test_lengths_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Models


@pytest.mark.parametrize("width", [13, 29], ids=["as long as an example", "longer"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("train", [True, False], ids=["labelled positions", "all positions"])
def test_packed_pretraining_is_padded_pretraining(attention, width, train):
    model = random_vectors_(HEADS["pretraining"].build(LOW, attention=attention, **NO_DROPOUT)).train(train)
    padded, packed = batches(width)
    assert_same_results(model, padded, packed, padded["attention_mask"].bool())


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("masked-lm", {"labels": PretrainingCollator(TOKENIZER, max_length=LONGEST)(examples())["labels"]}),
        ("next-sentence", {"labels": torch.tensor([0, 1, 1, 0, 1, 0, 0])}),
        ("sequence", {"labels": torch.tensor([0, 1, 4, 3, 2, 0, 2])}),
        ("tokens", {"labels": PretrainingCollator(TOKENIZER, max_length=LONGEST)(examples())["labels"].clamp(max=4)}),
    ],
)
def test_every_head_of_one_sequence_takes_packed_batches(head, labels):
    model = random_vectors_(HEADS[head].build(LOW, **NO_DROPOUT)).train()
    padded, packed = batches(16, **labels)
    assert_same_results(model, padded, packed, padded["attention_mask"].bool())


def squad_windows() -> list[dict[str, list[int] | int]]:
    spans = [(0, 0), (1, 2), (3, 6), (1, 1), (2, 4), (9, 10), (0, 3)]
    return [
        {
            **{name: example[name].tolist() for name in ("input_ids", "token_type_ids")},
            "start_positions": start,
            "end_positions": end,
            "example_id": "only decoding needs this",
        }
        for example, (start, end) in zip(examples(), spans, strict=True)
    ]


def test_packed_question_answering_is_that_of_windows_one_by_one():
    model = random_vectors_(HEADS["question-answering"].build(LOW, **NO_DROPOUT)).train()
    outputs = model(**PackingCollator(TOKENIZER, LONGEST, 16)(squad_windows()))
    alone = []
    for number, window in enumerate(squad_windows()):
        batch = {name: torch.tensor([value]) for name, value in window.items() if name != "example_id"}
        alone.append(model(**batch))
        for name in ("start_logits", "end_logits"):
            cut = outputs[name][number, : LENGTHS[number]]
            torch.testing.assert_close(cut, alone[-1][name][0], **CLOSE)
            behind = outputs[name][number, LENGTHS[number] :]
            assert (behind == torch.finfo(torch.float32).min).all()
    loss = sum(each.loss for each in alone) / len(alone)
    torch.testing.assert_close(outputs.loss, loss, **CLOSE)
    torch.testing.assert_close(gradients(model, outputs.loss), gradients(model, loss), **CLOSE)


def test_windows_of_one_length_give_the_loss_of_a_padded_batch():
    model = HEADS["question-answering"].build(LOW, **NO_DROPOUT).train()
    windows = [window for window in squad_windows() if len(window["input_ids"]) == 11]
    columns = ("input_ids", "token_type_ids", "start_positions", "end_positions")
    stacked = {name: torch.tensor([window[name] for window in windows]) for name in columns}
    packed = PackingCollator(TOKENIZER, 11, 22)(windows)
    assert packed["input_ids"].shape == (1, 22)
    torch.testing.assert_close(model(**packed).loss, model(**stacked).loss, **CLOSE)


def varlen_attention(module, query, key, value, mask, *, scaling, dropout, **kwargs):
    """What flash attention computes between bounds, over the tokens of all rows one after the other."""
    assert mask is None
    bounds = kwargs["cu_seq_lens_q"].tolist()
    assert kwargs["cu_seq_lens_k"].tolist() == bounds
    assert max(b - a for a, b in pairwise(bounds)) <= kwargs["max_length_q"]
    heads = [states.transpose(1, 2).flatten(0, 1).transpose(0, 1) for states in (query, key, value)]
    parts = [
        F.scaled_dot_product_attention(*(states[:, a:b] for states in heads), scale=scaling)
        for a, b in pairwise(bounds)
        if b > a
    ]
    return torch.cat(parts, dim=1).transpose(0, 1).unflatten(0, (len(query), -1)), None


def test_flash_attention_is_given_bounds_in_place_of_a_mask():
    model = HEADS["pretraining"].build(LOW, **NO_DROPOUT)
    _, packed = batches(16)
    expected = run(model, packed)
    model.config._attn_implementation = "flash_attention_2"
    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, flash_attention_2=varlen_attention):
        torch.testing.assert_close(run(model, packed)["loss"], expected["loss"], **CLOSE)


def test_one_graph_without_breaks_serves_batches_of_any_number_of_rows():
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model = HEADS["question-answering"].build(LOW, **NO_DROPOUT, num_hidden_layers=1).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for lengths in ((7, 6, 5, 4), (11, 6, 5, 13), (11, 13, 12, 8)):
        windows = [{**window, "end_positions": 1} for window in squad_windows()[1:5]]
        for window, length in zip(windows, lengths, strict=True):
            window["input_ids"], window["token_type_ids"] = [3] * length, [0] * length
        batch = PackingCollator(TOKENIZER, LONGEST)(windows)
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, **CLOSE)
    assert len(graphs) <= 2  # the first number of rows, and any


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(7, LONGEST)}, "packing .* takes the place of attention_mask"),
        ({"kernel": "sdpa_paged"}, "packed batches need attn_implementation eager, sdpa, .* got sdpa_paged"),
    ],
    ids=["mask", "kernel"],
)
def test_what_packing_cannot_be_used_with_is_named(change, message):
    model = HEADS["pretraining"].build(LOW)
    model.config._attn_implementation = change.pop("kernel", "sdpa")
    with pytest.raises(ValueError, match=message):
        model(**batches(16)[1], **change)


# Training


def train(folder, collate, model=None, **options) -> FLAMBeTrainer:
    args = FLAMBeTrainingArguments(
        output_dir=str(folder),
        learning_rate=0.02,
        max_steps=3,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = examples([2 + number % 11 for number in range(37)], vocab_size=61)
    trainer = FLAMBeTrainer(model or tiny_model(), args, train_dataset=data, eval_dataset=data, data_collator=collate)
    trainer.train()
    return trainer


def test_training_and_evaluation_do_not_change(tmp_path):
    padded = train(tmp_path, PretrainingCollator(TOKENIZER))
    packed = train(tmp_path, PackingCollator(TOKENIZER, LONGEST, 16))
    for name in ("loss", "grad_norm"):
        ours, theirs = ([e[name] for e in each.state.log_history if name in e] for each in (packed, padded))
        assert len(ours) == 3
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert packed.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model(stock=True), "packing needs a factorized BERT, .* BertForPreTraining does not"),
        (lambda: HEADS["decoder"].build(LOW), "FactorizedBertLMHeadModel does not"),
        (lambda: HEADS["multiple-choice"].build(LOW), "FactorizedBertForMultipleChoice does not"),
    ],
    ids=["stock", "decoder", "choice"],
)
def test_models_that_would_mix_sequences_are_refused_at_once(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, PackingCollator(TOKENIZER, LONGEST), model())


class Stream(ShardedStream):
    """Five examples in each of two shards."""

    num_shards, seed, start = 2, 0, (0,)

    def read(self, shard, epoch, place):
        for index in range(place[0], 5):
            yield examples([2 + 5 * shard + index])[0], (index + 1,)


def test_a_stream_that_goes_on_packs_what_it_would_have_padded():
    first = StreamLoader(Stream(), PackingCollator(TOKENIZER, LONGEST), batch_size=3)
    next(iter(first))
    loaders = [StreamLoader(Stream(), each, batch_size=3) for each in collators()]
    for loader in loaders:
        loader.load_state_dict(first.state_dict())
    for padded, packed in islice(zip(*loaders, strict=True), 3):
        taken = packed["input_ids"].flatten()[packed["packing"]["index"]]
        width = padded["input_ids"].shape[1]
        real = padded["attention_mask"].bool()
        assert torch.equal(taken[:, :width][real], padded["input_ids"][real])


# Scripts

QUIET = "--use_cpu --report_to none --disable_tqdm true --logging_steps 1 --save_strategy no --dropout 0"
PRETRAIN = f"""
    --vocab_size 300 --max_documents 12 --hidden_size 24 --num_hidden_layers 2 --num_attention_heads 3
    --intermediate_size 40 --max_position_embeddings 64 --qk_rank 5 --ffn_rank 7 --phases 24:3
    --learning_rate 0.01 {QUIET}
""".split()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("pretrained")
    flags = [*PRETRAIN, "--per_device_train_batch_size", "8", "--output_dir", str(folder)]
    return folder, pretrain_bert.main(flags)


def test_packing_in_two_processes_gives_the_losses_of_padding_in_one(pretrained, tmp_path):
    _, expected = pretrained
    flags = [*PRETRAIN, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path), "--packing", "true"]
    codes, output = launch(pretrain_bert.__file__, *flags)
    assert codes == [0, 0], output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["phase-1"]["train_loss"] == pytest.approx(expected["phase-1"]["train_loss"], rel=1e-4)


def finetune(model: Path, folder: Path, *more: str) -> dict:
    flags = f"--model {model} --output_dir {folder} --max_seq_length 64 --doc_stride 16 --max_query_length 16 {QUIET}"
    data = "--max_train_questions 12 --max_eval_questions 8 --max_steps 2 --per_device_train_batch_size 4"
    return finetune_squad.main([*flags.replace("--dropout 0", "").split(), *data.split(), *more])


def test_questions_are_answered_in_packed_batches_as_in_padded_ones(pretrained, tmp_path):
    def answers(name: str, *more: str) -> str:
        finetune(pretrained[0], tmp_path / name, "--learning_rate", "0", *more)
        return (tmp_path / name / "predictions.json").read_text()

    assert answers("packed", "--packing", "true", "--packed_length", "100") == answers("padded")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--packing", "true", "--packed_length", "63"], "packed_length must be at least 64, .* got 63"),
        (["--packed_length", "128"], "packed_length=128 is for packing=true"),
    ],
    ids=["too short", "alone"],
)
def test_options_that_do_not_fit_are_refused(pretrained, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        finetune(pretrained[0], tmp_path / "squad", *flags)
    assert not (tmp_path / "squad").exists()


@pytest.mark.parametrize(
    ("gpu", "cores", "processes", "workers"),
    [(False, 16, 1, 0), (True, 16, 1, 2), (True, 16, 8, 1), (True, 8, 8, 0)],
    ids=["cpu", "gpu", "few cores", "no core to spare"],
)
def test_data_is_prepared_beside_the_training_where_a_gpu_would_wait(monkeypatch, gpu, cores, processes, workers):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(use_cpu=False) == workers
    assert default_workers(use_cpu=True) == 0


@pytest.mark.parametrize(("given", "workers"), [({}, 0), ({"dataloader_num_workers": 7}, 7)], ids=["default", "given"])
def test_the_number_of_workers_that_is_given_stays(tmp_path, given, workers):
    args = TextTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)
    assert args.dataloader_num_workers == workers
