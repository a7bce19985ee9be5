"""Causal language modelling: blocks that lose no token, streams that go on, exact perplexity, and the script."""

from __future__ import annotations

import json
import math
import pickle
from itertools import chain, islice

import datasets
import numpy as np
import pytest
import torch
from after_cases import check_next_steps, check_settings
from launching import SCRIPTS, launch, launches
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from hf_fnl import FactorizedGPT2LMHeadModel
from hf_fnl.scripts import train_clm
from hf_fnl.tasks import clm
from hf_fnl.tasks.clm import DOCUMENTS_PER_GROUP, build_blocks
from hf_fnl.tasks.embedded import embedded_documents
from hf_fnl.tasks.metrics.tokens import causal_metrics, causal_sums
from hf_fnl.tasks.tokenization import load_tokenizer, train_byte_bpe

TEXTS = [text[:length] for text, length in zip(embedded_documents(), (300, 5, 700, 90, 41, 256, 1, 403), strict=False)]
STRIDES = pytest.mark.parametrize(("block_size", "stride"), [(2, 1), (13, 12), (13, 5), (900, 899)])
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
FORKS = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_bpe(embedded_documents()[:8], vocab_size=400)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    """The stream that all blocks are cut from."""
    documents = ([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS)
    return [tokenizer.eos_token_id, *chain.from_iterable(documents)]


def documents(streaming: bool = False, texts=TEXTS, num_shards: int = 1):
    stored = datasets.Dataset.from_dict({"text": texts})
    return stored.to_iterable_dataset(num_shards=num_shards) if streaming else stored


def equal(left, right) -> bool:
    return len(left) == len(right) and all(torch.equal(a[n], b[n]) for a, b in zip(left, right, strict=True) for n in a)


def predicted(blocks) -> list[int]:
    """What is predicted, in its order."""
    return [token for block in blocks for token in block["labels"][1:].tolist() if token != -100]


# Blocks


@STRIDES
@STREAMING
def test_every_token_is_predicted_once_and_in_its_order(tokenizer, tokens, streaming, block_size, stride):
    blocks = list(build_blocks(documents(streaming), tokenizer, block_size=block_size, stride=stride))
    assert predicted(blocks) == tokens[1:]
    assert {block[name].shape for block in blocks for name in block} == {(block_size,)}
    assert all(block["labels"][0] == -100 for block in blocks)  # so that counts of labels are counts of predictions


@STRIDES
def test_each_block_is_a_stretch_of_the_stream(tokenizer, tokens, block_size, stride):
    blocks = build_blocks(documents(), tokenizer, block_size=block_size, stride=stride)
    for index in range(len(blocks)):
        stretch = tokens[index * stride : index * stride + block_size]
        padding = [tokenizer.eos_token_id] * (block_size - len(stretch))
        assert blocks[index]["input_ids"].tolist() == stretch + padding
        assert (len(stretch) == block_size) or index == len(blocks) - 1
    assert torch.equal(blocks[-1]["input_ids"], blocks[len(blocks) - 1]["input_ids"])
    with pytest.raises(IndexError):
        blocks[len(blocks)]


@pytest.mark.parametrize(
    ("length", "block_size", "stride", "count"),
    [(13, 13, 12, 1), (14, 13, 12, 2), (25, 13, 12, 2), (26, 13, 12, 3), (14, 13, 1, 2), (20, 13, 1, 8), (3, 13, 5, 1)],
)
@STREAMING
def test_a_block_more_begins_only_where_a_token_is_left(streaming, length, block_size, stride, count):
    text = "é" * (length - 2)  # two bytes each
    byte = train_byte_bpe(["é é"], vocab_size=258)
    assert len(byte(text)["input_ids"]) == length - 2
    blocks = build_blocks(documents(streaming, [text]), byte, block_size=block_size, stride=stride)
    assert len(list(blocks)) == count


def test_the_words_and_tokens_that_perplexity_divides_by(tokenizer, tokens):
    blocks = build_blocks(documents(), tokenizer, block_size=13, stride=5)
    assert blocks.num_tokens == len(predicted(blocks)) == len(tokens) - 1
    assert blocks.num_words == sum(len(text.split()) for text in TEXTS)


@FORKS
def test_blocks_do_not_depend_on_processes_nor_on_how_the_file_is_divided(tokenizer):
    whole = build_blocks(documents(), tokenizer, block_size=13)
    in_parts = datasets.concatenate_datasets([documents(texts=[text]) for text in TEXTS])
    two = build_blocks(documents(), tokenizer, block_size=13, num_proc=2)
    three = build_blocks(in_parts, tokenizer, block_size=13, num_proc=3)
    assert len(two.documents.data.column("tokens").chunks) > 1
    assert equal(whole, two)
    assert equal(whole, three)


def test_encoded_documents_are_found_again_and_blocks_can_be_sent(tmp_path, tokenizer):
    documents().save_to_disk(tmp_path)
    stored = datasets.load_from_disk(tmp_path)
    one, two = (build_blocks(stored, tokenizer, block_size=size) for size in (13, 64))
    assert one.documents.cache_files == two.documents.cache_files != []
    sent = pickle.dumps(one)
    assert len(sent) < 20_000
    assert equal(pickle.loads(sent), one)


# Streams


def counted(count: int, read: list):
    for number in range(count):
        read.append(number)
        yield {"text": TEXTS[number % len(TEXTS)]}


def test_a_stream_is_read_a_group_at_a_time(tokenizer):
    read: list[int] = []
    source = datasets.IterableDataset.from_generator(counted, gen_kwargs={"count": 3000, "read": read})
    blocks = build_blocks(source, tokenizer, block_size=13)
    assert len(read) <= 1
    read.clear()
    list(islice(blocks, 500))
    assert len(read) <= DOCUMENTS_PER_GROUP + 1


def test_groups_of_a_stream_lose_no_token(tokenizer, tokens, monkeypatch):
    monkeypatch.setattr(clm, "DOCUMENTS_PER_GROUP", 3)
    blocks = list(build_blocks(documents(True), tokenizer, block_size=13, stride=5))
    assert predicted(blocks) == tokens[1:]


# Perplexity


def tiny_model(tokenizer, n_positions: int = 64) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": n_positions, "initializer_range": 0.3}
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, **sizes, **rates))


def trainer_of(folder, model, **options) -> Trainer:
    names = ("train_dataset", "eval_dataset", "compute_metrics", "preprocess_logits_for_metrics", "callbacks")
    given = {name: options.pop(name) for name in names if name in options}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(folder), **{**quiet, **options})
    return Trainer(model, arguments, data_collator=default_data_collator, **given)


def evaluate(folder, model, blocks, batch_size: int) -> dict[str, float]:
    trainer = trainer_of(
        folder,
        model,
        eval_dataset=blocks,
        compute_metrics=lambda prediction: causal_metrics(prediction, num_words=blocks.num_words),
        preprocess_logits_for_metrics=causal_sums,
        per_device_eval_batch_size=batch_size,
    )
    return trainer.evaluate()


@torch.no_grad()
def nats_token_by_token(model, tokens, block_size: int, stride: int) -> float:
    """Negative log-likelihood, with each token after as much context as the windows give it."""
    total = 0.0
    for position in range(1, len(tokens)):
        window = max(0, math.ceil((position - block_size + 1) / stride))
        context = torch.tensor([tokens[window * stride : position]])
        total += F.cross_entropy(model(context).logits[0, -1], torch.tensor(tokens[position])).item()
    return total


@pytest.mark.parametrize(("stride", "batch_size"), [(63, 5), (17, 3)])
def test_perplexity_is_that_of_the_whole_text(tmp_path, tokenizer, tokens, stride, batch_size):
    model = tiny_model(tokenizer).eval()
    found = evaluate(tmp_path, model, build_blocks(documents(), tokenizer, block_size=64, stride=stride), batch_size)
    nats = nats_token_by_token(model, tokens, 64, stride)
    words = sum(len(text.split()) for text in TEXTS)
    assert (found["eval_tokens"], found["eval_words"]) == (len(tokens) - 1, words)
    assert found["eval_nats_per_token"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert found["eval_loss"] == found["eval_nats_per_token"]
    assert found["eval_perplexity_per_token"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)
    assert found["eval_perplexity_per_word"] == pytest.approx(math.exp(nats / words), rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "num_words", "expected"),
    [
        ([[3.0, 2], [1.0, 6]], 4, {"nats_per_token": 0.5, "perplexity_per_word": math.e, "tokens": 8}),
        ([[0.0, 0]], 0, {"nats_per_token": 0.0, "perplexity_per_token": 1.0, "perplexity_per_word": 1.0}),
        ([[1e4, 2]], 1, {"perplexity_per_token": math.exp(700)}),
    ],
    ids=["sums", "nothing", "overflow"],
)
def test_perplexities_by_hand(rows, num_words, expected):
    found = causal_metrics(EvalPrediction(predictions=np.array(rows), label_ids=None), num_words=num_words)
    assert expected.items() <= found.items()
    assert found["words"] == num_words


# The script

TINY = """
    --vocab_size 300 --max_documents 12 --n_embd 24 --n_layer 2 --n_head 3 --n_positions 32 --max_steps 3
    --per_device_train_batch_size 4 --learning_rate 0.01 --use_cpu --report_to none --disable_tqdm true
    --save_strategy no
"""


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held-out.json"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return ["--validation_dataset", str(path)]


def run(folder, *more: str) -> dict:
    return train_clm.main([*TINY.split(), "--output_dir", str(folder), *more])


def test_the_script_writes_a_model_its_tokenizer_metrics_and_settings(tmp_path, held_out):
    flags = "--rank_scale 0.625 --embedding_rank 11 --frobenius_decay linear --eval_stride 7"
    found = run(tmp_path / "run", *flags.split(), *held_out)
    classes = train_clm.ModelOptions, train_clm.DataOptions, train_clm.LanguageModelArguments
    check_settings(tmp_path / "run", *classes)
    check_next_steps(tmp_path / "run", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert isinstance(model, FactorizedGPT2LMHeadModel)
    assert (model.config.qkv_rank, model.config.ffn_rank, model.config.embedding_rank) == (15, 15, 11)
    assert len(load_tokenizer(tmp_path / "run")) == model.config.vocab_size
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics == found
    assert metrics["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert metrics["eval_words"] == sum(len(text.split()) for text in TEXTS)
    assert metrics["eval_perplexity_per_word"] > metrics["eval_perplexity_per_token"] > 1
    blocks = build_blocks(documents(), load_tokenizer(tmp_path / "run"), block_size=32, stride=7)
    again = evaluate(tmp_path, model, blocks, 3)
    assert again["eval_nats_per_token"] == pytest.approx(metrics["eval_nats_per_token"], rel=1e-5)


@pytest.mark.parametrize(("size", "evaluated", "warned"), [(16, 32, True), (16, None, False)])
def test_the_script_evaluates_at_another_length_than_it_trains(tmp_path, held_out, caplog, size, evaluated, warned):
    flags = ["--block_size", str(size), *(["--eval_block_size", str(evaluated)] if evaluated else [])]
    found = run(tmp_path / "run", *flags, *held_out)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    blocks = build_blocks(documents(), load_tokenizer(tmp_path / "run"), block_size=evaluated or size)
    again = evaluate(tmp_path, model, blocks, 3)
    assert again["eval_nats_per_token"] == pytest.approx(found["eval_nats_per_token"], rel=1e-5)
    assert ("positions in between are evaluated as they were drawn" in caplog.text) == warned


def test_the_script_on_the_stock_class_while_streaming_and_further_from_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(clm, "DOCUMENTS_PER_GROUP", 4)
    stock = ("--stock", "true", "--streaming", "true", "--optim", "adamw_torch", "--block_size", "16")
    assert "eval_loss" not in run(tmp_path / "one", *stock)
    run(tmp_path / "two", *stock, "--init_from", str(tmp_path / "one"), "--learning_rate", "0")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert type(second) is GPT2LMHeadModel
    assert equal([first.state_dict()], [second.state_dict()])


def test_the_script_trains_dense_and_then_goes_on_at_low_rank(tmp_path):
    flags = ("--rank_scale", "0.5", "--dense_steps", "2", "--factor_init", "linear=spectral")
    found = run(tmp_path / "run", *flags, "--low_rank_lr_scale", "0.5")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert (model.config.qkv_rank, model.config.ffn_rank) == (12, 12)
    assert model.config.factor_init == {"linear": "spectral"}
    assert found["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "low_rank_parameters" in entry] == [2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dense_steps", "2"], "dense_steps=2 needs ranks"),
        (["--stock", "true", "--dense_steps", "2"], "dense_steps=2 needs ranks"),
        (["--rank_scale", "1.5"], "rank_scale must be above 0 and at most 1, got 1.5"),
        (["--rank_scale", "0.5", "--ffn_rank", "3"], "rank_scale sets .*: leave out rank_scale or ffn_rank"),
        (
            ["--stock", "true", "--rank_scale", "0.5", "--ov_rank", "2"],
            "stock=True does not go with rank_scale, ov_rank",
        ),
        (["--qkv_rank", "25"], r"qkv_rank must be in \[1, 24\], got 25"),
        (["--block_size", "33"], "block_size: the model's n_positions is 32, got 33"),
        (["--eval_block_size", "33"], "eval_block_size: the model's n_positions is 32, got 33"),
        (["--block_size", "1"], "block_size must be at least 2, got 1"),
        (["--validation_dataset", "embedded", "--eval_stride", "32"], "stride must be .* which is 32; got 32"),
        (["--dataset", "./nowhere.txt"], "no such file or folder: nowhere.txt"),
    ],
    ids=[
        "dense steps",
        "stock dense steps",
        "scale",
        "scale and rank",
        "stock",
        "rank",
        "long block",
        "long block of the evaluation",
        "short block",
        "stride",
        "data",
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@launches
def test_two_processes_train_and_evaluate_as_one(tmp_path, held_out):
    flags = ("--dropout", "0", "--frobenius_decay", "none", "--optim", "lamb")
    one = run(tmp_path / "one", *flags, *held_out)
    given = f"--output_dir {tmp_path}/two --per_device_train_batch_size 2".split()
    codes, output = launch(SCRIPTS / "train_clm.py", *TINY.split(), *flags, *held_out, *given)
    assert not any(codes), output
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (two["eval_tokens"], two["eval_words"]) == (one["eval_tokens"], one["eval_words"])
    assert two["eval_nats_per_token"] == pytest.approx(one["eval_nats_per_token"], rel=1e-4)


# What bad input gets


@STREAMING
@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"body": ["One."]}, {}, r"need a column 'text', they have \['body'\]"),
        ({"text": ["One."]}, {"block_size": 1}, "block_size must be at least 2, got 1"),
        ({"text": ["One."]}, {"stride": 0}, "stride must be at least 1 and below block_size, which is 13; got 0"),
        ({"text": ["One."]}, {"stride": 13}, "which is 13; got 13"),
    ],
    ids=["no text column", "block_size", "no stride", "long stride"],
)
def test_bad_documents_and_sizes_are_refused(tokenizer, streaming, columns, options, message):
    stored = datasets.Dataset.from_dict(
        columns, features=datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    )
    with pytest.raises(ValueError, match=message):
        list(
            build_blocks(
                stored.to_iterable_dataset() if streaming else stored, tokenizer, **{"block_size": 13, **options}
            )
        )


@STREAMING
def test_no_documents_are_refused_at_once(tokenizer, streaming):
    none = datasets.IterableDataset.from_generator(counted, gen_kwargs={"count": 0, "read": []})
    with pytest.raises(ValueError, match="no document with text"):
        build_blocks(none if streaming else datasets.Dataset.from_dict({"text": []}), tokenizer, block_size=13)


def test_documents_without_text_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no document with text"):
        build_blocks(datasets.Dataset.from_dict({"text": [" ", None, ""]}), tokenizer, block_size=13)


def test_a_tokenizer_without_end_of_text_is_refused():
    tokenizer = train_byte_bpe(TEXTS, vocab_size=300)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no eos_token"):
        build_blocks(documents(), tokenizer, block_size=13)
