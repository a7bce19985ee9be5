"""Texts to calibrate with: as many samples as asked for, whatever their shape, and no more read than needed."""

from __future__ import annotations

import bz2
import gzip
import json
from itertools import chain, pairwise
from pathlib import Path

import pytest
from cli_cases import WORDS, cli, llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_fnl.cli.texts import Texts, calibration_batches, read_texts


class Counting(PreTrainedTokenizerFast):
    """A tokenizer that notes how many characters it is given."""

    def __call__(self, text, **options):
        seen.append(len(text))
        return super().__call__(text, **options)


seen: list[int] = []


def tokenizer(special: bool = False) -> Counting:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return Counting(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")


def words(count: int, start: int = 0) -> list[str]:
    return [WORDS[(7 * i + i // 40) % 40] for i in range(start, start + count)]


def rows_of(monkeypatch, source: Path, samples: int, length: int, *, special: bool = False, model=None):
    monkeypatch.setattr("hf_fnl.cli.texts.load_tokenizer", lambda _: tokenizer(special))
    seen.clear()
    texts = Texts(source=str(source), column="text", samples=samples, length=length)
    batches = calibration_batches(model or llama(), read_texts("the model", texts), texts)
    predicts = model is None or isinstance(model, LlamaForCausalLM)
    names = {"input_ids", "labels"} if predicts else {"input_ids"}
    assert all(set(batch) == names for batch in batches)  # samples of one length: there is no padding
    return [row for batch in batches for row in batch["input_ids"].tolist()]


def ids(text: list[str]) -> list[int]:
    return tokenizer()(" ".join(text))["input_ids"]


SHAPES = {
    "one line": lambda text: " ".join(text),
    "lines": lambda text: "\n".join(" ".join(text[i : i + 3]) for i in range(0, len(text), 3)),
    "windows lines": lambda text: "\r\n".join(text),
    "blank line at the end": lambda text: " ".join(text) + "\n\n \n",
    "byte order mark": lambda text: "\ufeff" + " ".join(text),
}


@pytest.mark.parametrize("special", [False, True], ids=["plain", "special tokens"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_document_that_just_suffices_gives_every_sample(tmp_path, monkeypatch, shape, special):
    room = 11 - 2 * special
    text = words(7 * room)
    (tmp_path / "t.txt").write_text(shape(text), newline="")
    rows = rows_of(monkeypatch, tmp_path / "t.txt", 7, 11, special=special)
    assert list(map(len, rows)) == [11] * 7
    assert [row[0] == 2 and row[-1] == 3 for row in rows] == [special] * 7
    assert [token for row in rows for token in (row[1:-1] if special else row)] == ids(text)


@pytest.mark.parametrize("opened", [gzip.open, bz2.open], ids=["gz", "bz2"])
def test_compressed_texts_are_read_as_they_are(tmp_path, monkeypatch, opened):
    suffix = {gzip.open: "gz", bz2.open: "bz2"}[opened]
    with opened(tmp_path / f"t.txt.{suffix}", "wt") as file:
        file.write(" ".join(words(50)))
    rows = rows_of(monkeypatch, tmp_path / f"t.txt.{suffix}", 5, 10)
    assert list(chain.from_iterable(rows)) == ids(words(50))


def test_first_samples_of_all_documents_come_before_second_ones(tmp_path, monkeypatch):
    documents = [words(80), words(76, 100), words(90, 200)]  # each long enough for a sample, as far as is known
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in documents))
    expected = [*(text[:10] for text in documents), *(text[10:20] for text in documents[:2])]
    assert sorted(rows_of(monkeypatch, tmp_path / "t.jsonl", 5, 10)) == sorted(map(ids, expected))


def test_a_language_model_reads_short_documents_together_and_an_encoder_each_by_itself(tmp_path, monkeypatch):
    """As in data sets with a row for every paragraph and heading."""
    documents = [words(3, 10 * number) for number in range(100)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in documents))
    rows = rows_of(monkeypatch, tmp_path / "t.jsonl", 4, 10)
    assert list(map(len, rows)) == [10] * 4
    assert rows[0] == ids(list(chain.from_iterable(documents))[:10])
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertModel(BertConfig(vocab_size=50, **sizes))
    assert rows_of(monkeypatch, tmp_path / "t.jsonl", 4, 10, model=bert) == [ids(text) for text in documents[:4]]


def test_blank_lines_part_nothing(tmp_path, monkeypatch):
    text = words(60)
    (tmp_path / "t.txt").write_text("\n \n".join(" ".join(text[i : i + 4]) for i in range(0, 60, 4)))
    assert list(chain.from_iterable(rows_of(monkeypatch, tmp_path / "t.txt", 6, 10))) == ids(text)


def test_a_long_line_is_neither_read_nor_tokenized_further_than_needed(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    with path.open("w") as file:
        for _ in range(300):
            file.write(" ".join(words(2_000)) + " ")  # 2 MB without an end of a line
    assert list(map(len, rows_of(monkeypatch, path, 8, 16))) == [16] * 8
    assert sum(seen) < 10 * 8 * 16 * 16
    texts = list(Texts(source=str(path), column="text", samples=8, length=16).documents())
    assert [len(text) for text in texts] == [8 * 16 * 16 - 1]  # without the blank at its end


def test_slices_of_a_document_join_to_the_whole(tmp_path, monkeypatch):
    text = words(6_000)
    (tmp_path / "t.txt").write_text(" ".join(text))
    rows = rows_of(monkeypatch, tmp_path / "t.txt", 500, 12)
    assert list(chain.from_iterable(rows)) == ids(text)
    assert len(seen) > 50
    assert all(first <= 256 for first, _ in pairwise(seen[2:]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 noir", r"t.txt is no text in UTF-8, it holds b'\\xe9'"),
        ("text".encode("utf-16"), r"t.txt is no text in UTF-8, it holds b'\\xff'"),
        (b"", "empty data file"),
        (b" \n\n \n", "no text in"),
    ],
    ids=["latin-1", "utf-16", "empty", "blank"],
)
def test_what_is_no_text_is_an_error(tmp_path, monkeypatch, content, message):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        rows_of(monkeypatch, tmp_path / "t.txt", 2, 4)


@pytest.mark.parametrize("vocab_size", [10, 43])
def test_a_tokenizer_of_another_model_is_refused(tmp_path, monkeypatch, vocab_size):
    (tmp_path / "t.txt").write_text(" ".join(WORDS))
    with pytest.raises(ValueError, match=f"knows {vocab_size} tokens: it gives the token 43"):
        rows_of(monkeypatch, tmp_path / "t.txt", 2, 64, model=llama(vocab_size=vocab_size))


def test_a_model_with_fewer_positions_reads_shorter_samples(tmp_path, monkeypatch):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=50, max_position_embeddings=6, **sizes))
    (tmp_path / "t.txt").write_text(" ".join(words(40)))
    assert list(map(len, rows_of(monkeypatch, tmp_path / "t.txt", 3, 100, special=True, model=model))) == [6] * 3
    with pytest.raises(ValueError, match="--calibration-length 2 has no room for text beside 2 special tokens"):
        rows_of(monkeypatch, tmp_path / "t.txt", 3, 2, special=True, model=model)


@pytest.mark.parametrize(("count", "warned"), [(64, False), (63, True)])
def test_the_command_says_how_many_tokens_it_used(tmp_path, count, warned):
    llama().save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("\n".join(words(count)))
    given = f"--rank 4 --calibrate {tmp_path}/t.txt --calibration-samples 8 --calibration-length 8".split()
    result = cli("factorize", tmp_path / "m", *given, "--out", tmp_path / "o", "--json")
    assert json.loads(result.stdout)["calibration_tokens"] == count
    assert json.loads((tmp_path / "o" / "factorization.json").read_text())["calibration_tokens"] == count
    assert ("gives 63 tokens to calibrate with, not 64" in result.stderr) == warned
    assert f"calibrated with {count} tokens" in cli("factorize", tmp_path / "m", *given, "--out", tmp_path / "p").stdout


def test_a_cut_model_is_healed_on_texts(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("\n\n".join(" ".join(words(300, start)) for start in range(0, 9_000, 300)))
    given = f"--rank 4 --heal {tmp_path}/t.txt --heal-steps 30 --heal-bf16 --out {tmp_path}/o --json".split()
    result = cli("factorize", tmp_path / "m", *given)
    healing = json.loads(result.stdout)["healing"]
    assert healing["held_out_after"] < healing["held_out_before"]
    assert (healing["steps"], healing["bf16"]) == (30, True)
    assert healing["tokens"] == 9_000
    gone = ("--rank", 4, "--heal", tmp_path / "gone.txt", "--out", tmp_path / "p")
    assert "gone.txt" in cli("factorize", tmp_path / "m", *gone, code=1).stderr


@pytest.mark.parametrize("value", [5, True, ["a", "b"]], ids=str)
def test_a_row_of_something_else_is_an_error(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("a word", None, value)))
    with pytest.raises(ValueError, match=r"column 'text' of .*rows\.jsonl holds .*, which is no text"):
        list(Texts(source=str(path), column="text", samples=3, length=8).documents())
