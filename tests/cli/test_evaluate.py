"""Language models side by side: perplexity against token by token, and what cannot be evaluated."""

import json
import math
from pathlib import Path
from unittest import mock

import cli_cases
import pytest
import torch
from cli_cases import WORDS
from launching import FORKS, launches
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.cli import app
from hf_fnl.cli.evaluate import Settings, _table, measure
from hf_fnl.tasks.perplexity import text_perplexity

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(vocab_size: int = 50) -> LlamaForCausalLM:
    return cli_cases.llama(vocab_size=vocab_size, initializer_range=0.5, **SIZES).eval()


@pytest.mark.parametrize(("count", "length", "stride"), [(23, 7, 3), (23, 7, 6), (5, 7, 2), (22, 7, 1)])
def test_each_token_is_predicted_once_from_what_its_window_holds(count: int, length: int, stride: int) -> None:
    model, ids = llama(), torch.randint(50, (count,), generator=torch.Generator().manual_seed(1))
    nll = 0.0
    for i in range(1, count):
        start = max(0, math.ceil((i + 1 - length) / stride)) * stride  # of the first window that holds it
        with torch.no_grad():
            nll -= model(input_ids=ids[None, start : i + 1]).logits[0, -2].log_softmax(-1)[ids[i]].item()
    found = text_perplexity(model, ids, 9, length=length, stride=stride)
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert (found.tokens, found.words) == (count - 1, 9)
    assert found.per_token == pytest.approx(math.exp(nll / (count - 1)), rel=1e-5)
    assert found.per_word == pytest.approx(math.exp(nll / 9), rel=1e-5)


@pytest.mark.parametrize(
    ("count", "words", "stride", "message"),
    [
        (1, 1, 2, "at least 2 tokens and a word, got 1 and 1"),
        (5, 0, 2, "at least 2 tokens and a word, got 5 and 0"),
        (5, 1, 7, "below the length of a window, 7, got 7"),
        (5, 1, 0, "at least 1 and below"),
    ],
)
def test_what_has_no_perplexity(count: int, words: int, stride: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_perplexity(llama(), torch.ones(count, dtype=torch.long), words, length=7, stride=stride)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one tokenizer, a text, and an encoder."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    dense = llama()
    dense.save_pretrained(folder / "dense")
    factorize_(dense, FactorizationConfig(rank=3))
    dense.save_pretrained(folder / "small")
    BertModel(BertConfig(vocab_size=50, **SIZES)).save_pretrained(folder / "bert")
    llama(vocab_size=20).save_pretrained(folder / "narrow")
    for name in ("dense", "small", "bert", "narrow"):
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder / name)
    (folder / "t.txt").write_text("\n".join(" ".join(WORDS[(7 * i + j) % 40] for j in range(9)) for i in range(30)))
    return folder


def run(*words: object) -> tuple[int, str, str]:
    with mock.patch("multiprocessing.get_context", return_value=FORKS):
        result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    return result.exit_code, result.stdout, result.stderr


@launches
def test_two_models_stand_side_by_side(folder: Path) -> None:
    options = ("--texts", folder / "t.txt", "--tokens", 100, "--length", 20, "--stride", 10)
    code, output, errors = run(folder / "dense", folder / "small", *options, "--json")
    assert code == 0, errors
    dense, small = json.loads(output)["models"]
    ids = torch.tensor([2 + (7 * (i // 9) + i % 9) % 40 for i in range(100)])
    expected = text_perplexity(llama(), ids, 100, length=20, stride=10)
    assert dense["perplexity"] == pytest.approx(expected.per_token, rel=1e-4)
    assert (dense["tokens"], dense["words"]) == (99, 100)
    assert dense["perplexity_per_word"] == pytest.approx(expected.per_word, rel=1e-4)
    assert dense["perplexity"] != small["perplexity"]
    assert dense["bytes"] == 4 * dense["parameters"] == 4 * llama().num_parameters()
    assert small["parameters"] < dense["parameters"]
    assert all(each > 0 for row in (dense, small) for each in (*row["tokens_per_second"].values(), row["peak_memory"]))


@launches
def test_int8_stands_beside_each_model(folder: Path) -> None:
    options = ("--texts", folder / "t.txt", "--tokens", 60, "--length", 20, "--stride", 10, "--int8")
    code, output, errors = run(folder / "dense", folder / "small", *options, "--json")
    assert code == 0, errors
    rows = json.loads(output)["models"]
    assert [row["int8"] for row in rows] == [False, True, False, True]
    for plain, int8 in (rows[:2], rows[2:]):
        assert int8["parameters"] == plain["parameters"]
        assert int8["bytes"] < 0.7 * plain["bytes"]
        assert int8["perplexity"] != plain["perplexity"]
        assert int8["perplexity"] == pytest.approx(plain["perplexity"], rel=0.2)
        assert int8["cache_bytes_per_token"] == plain["cache_bytes_per_token"] == 2 * 2 * 16 * 4  # layers, k and v
    assert rows[3]["bytes"] < rows[1]["bytes"]


def test_rows_without_text_are_passed_over_and_windows_are_those_of_the_model(folder: Path) -> None:
    rows = [None, " ".join(WORDS), None, " ".join(WORDS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    found = measure(str(folder / "dense"), Settings(str(folder / "rows.jsonl"), "text", 60, 9999, 10, "float32", "cpu"))
    assert (found["tokens"], found["length"], found["stride"]) == (59, llama().config.max_position_embeddings, 10)
    windows = next(column for column in _table([found]).columns if column.header == "windows")
    assert list(windows.cells) == [f"{found['length']} by 10"]


def test_a_text_file_is_one_text_as_it_stands(folder: Path) -> None:
    text = "one\n\n\n    two\n three\n"
    (folder / "lines.txt").write_text(text)
    settings = Settings(str(folder / "lines.txt"), "text", 60, 20, 10, "float32", "cpu")
    read = mock.patch("hf_fnl.tasks.perplexity.first_tokens", side_effect=InterruptedError)
    with read as tokens, pytest.raises(InterruptedError):
        measure(str(folder / "dense"), settings)
    assert tokens.call_args.args[1] == text.strip()


def test_narrow_values_take_less_of_the_cache(folder: Path) -> None:
    model = llama()
    factorize_(model, FactorizationConfig(kinds=("ov",), rank=3))
    model.save_pretrained(folder / "heads")
    PreTrainedTokenizerFast.from_pretrained(folder / "dense").save_pretrained(folder / "heads")
    found = measure(str(folder / "heads"), Settings(str(folder / "t.txt"), "text", 50, 20, 10, "float32", "cpu"))
    assert found["cache_bytes_per_token"] == 2 * 2 * (8 + 3) * 4  # layers, heads, keys and values, bytes


@launches
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--texts t.txt --int8 --dtype bfloat16", 2, "--int8 quantizes --dtype float32, got bfloat16"),
        ("--texts t.txt --int8 --device cuda", 2, "--int8 runs on --device cpu, got cuda"),
        ("--texts t.txt", 1, "is a BertModel, which is no causal language model"),
        ("--texts t.txt --stride 8 --length 8", 2, "--stride must be below --length, 8, got 8"),
        ("--texts t.txt --dtype int8", 2, "--dtype must be float32"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(folder: Path, options: str, code: int, message: str) -> None:
    found, _, errors = run(folder / "bert", *options.replace("t.txt", str(folder / "t.txt")).split())
    assert found == code
    assert message in " ".join(errors.split())


@pytest.mark.parametrize(
    ("model", "texts", "error", "message"),
    [
        ("narrow", "t.txt", ValueError, "gives the token 41, and the model knows 20"),
        ("dense", "gone.txt", FileNotFoundError, "gone.txt"),
        ("dense", "empty.txt", ValueError, "empty"),
        ("dense", "one.txt", ValueError, "at least 2 tokens and a word, got 1 and 1"),
    ],
)
def test_texts_and_tokenizers_that_do_not_fit(
    folder: Path, model: str, texts: str, error: type[Exception], message: str
) -> None:
    (folder / "empty.txt").write_text("")
    (folder / "one.txt").write_text("w1")
    settings = Settings(str(folder / texts), "text", 50, 20, 10, "float32", "cpu")
    with pytest.raises(error, match=message):
        measure(str(folder / model), settings)
