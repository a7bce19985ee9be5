"""The translation scripts as a user runs them, in small: train, average, translate, resume; what is refused."""

from __future__ import annotations

import io
import json

import pytest
import torch
from after_cases import check_next_steps, check_settings
from launching import SCRIPTS, launch, launches
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianMTModel
from translation_cases import PAIRS, phrases, tiny_marian, tiny_tokenizer

from hf_fnl import FactorizedMarianMTModel
from hf_fnl.scripts import train_translation
from hf_fnl.scripts import translate as translate_script
from hf_fnl.tasks.beam_search import translate
from hf_fnl.tasks.metrics.bleu import bleu_scores
from hf_fnl.tasks.phrases import embedded_phrases
from hf_fnl.tasks.translation_training import TranslationArguments

TINY = """
    --vocab_size 150 --hidden_size 24 --encoder_layers 1 --decoder_layers 2 --num_attention_heads 3
    --intermediate_size 40 --max_position_embeddings 128 --max_train_pairs 61 --max_validation_pairs 7
    --max_test_pairs 5 --max_tokens 600 --max_steps 4 --num_beams 2 --warmup_steps 2
    --use_cpu --report_to none --disable_tqdm true --logging_steps 1
"""
RANKS = "--qk_rank 5 --ov_rank 6 --ffn_rank 7 --embedding_rank 11"


def train(folder, *more: str) -> dict:
    return train_translation.main([*TINY.split(), "--save_strategy", "no", "--output_dir", str(folder), *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A factorized model, and the metrics of its run."""
    folder = tmp_path_factory.mktemp("trained")
    saving = "--save_strategy steps --save_steps 1 --normalize_before true"
    return folder, train(folder, *RANKS.split(), *saving.split(), "--factor_init", "ov=default", "linear=spectral")


def test_training_writes_model_tokenizer_translations_metrics_and_settings(trained):
    folder, metrics = trained
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert isinstance(model, FactorizedMarianMTModel)
    assert (model.config.qk_rank, model.config.ov_rank, model.config.embedding_rank) == (5, 6, 11)
    assert model.config.normalize_before
    assert model.config.factor_init == {"ov": "default", "linear": "spectral"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == 128
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert metrics["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert metrics["eval_loss"] > 0
    settings = json.loads((folder / "run_config.json").read_text())
    assert (settings["max_tokens"], settings["optim"], settings["languages"]) == (600, "adamw_torch", ["de", "en"])


def test_what_users_do_with_a_translation_model(trained, tmp_path):
    folder, _ = trained
    check_settings(folder, train_translation.ModelOptions, train_translation.DataOptions, TranslationArguments)
    check_next_steps(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Ja.\nNein.\nSch\xf6n.\n", "standard input, line 3, is not UTF-8 text: .* 0xf6"),
        (b"Ja.\r\nNein\xc3", "standard input, line 2, is not UTF-8 text: .* 0xc3"),
    ],
    ids=["latin 1", "broken off"],
)
def test_bytes_that_are_no_text(trained, monkeypatch, content, message):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ValueError, match=message):
        translate_script.main(["--model", str(trained[0]), "--use_cpu"])


@pytest.mark.parametrize(("content", "lines"), [(b"", 0), (b"\n\n", 2)], ids=["empty", "blank lines"])
def test_nothing_to_translate_is_said(trained, monkeypatch, capsys, content, lines):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert translate_script.main(["--model", str(trained[0]), "--use_cpu"]) == {"sentences": lines}
    printed = capsys.readouterr()
    assert printed.out == "\n" * lines
    assert "there is nothing to translate" in printed.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nosuch", "--model nosuch: there is no folder nosuch, and the Hub could not be asked"),
        ("--model ./nosuch", r"--model \./nosuch: there is no folder"),
        ("--num_beams 0", "num_beams must be at least 1, got 0"),
        ("--output {file}/out.txt", "output .*: .* is a file"),
        ("--input nowhere.txt", r"--input nowhere\.txt: there is no such file"),
        ("--input {file}", "--input .*line 1, is not UTF-8"),
    ],
)
def test_what_translate_refuses(trained, tmp_path, flags, message):
    (tmp_path / "file").write_bytes(b"\xff")
    words = flags.format(file=tmp_path / "file").split()
    model = [] if "--model" in words else ["--model", str(trained[0])]
    with pytest.raises((ValueError, OSError), match=message):
        translate_script.main([*words, *model, "--use_cpu"])


def test_the_positions_of_a_model_bound_its_sentences():
    """Also where its tokenizer knows of no bound."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    model = tiny_marian(tokenizer, positions=12)
    with pytest.raises(ValueError, match=r"sentence 2 has \d+ tokens, the model takes 12"):
        translate(model, tokenizer, ["Ja", "Ja " * 12])
    assert len(translate(model, tokenizer, ["Ja"], num_beams=2)) == 1


def test_the_scores_are_those_of_the_written_translations(trained):
    folder, metrics = trained
    found = (folder / "translations.txt").read_text().split("\n")[:-1]
    assert metrics["test"] == bleu_scores(found, embedded_phrases("test")["target"][:5])


def test_translating_gives_what_training_gave(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    written = (folder / "translations.txt").read_text()
    sentences = "".join(f"{text}\n" for text in embedded_phrases("test")["source"][:5])
    (tmp_path / "in.txt").write_text(sentences)
    common = ["--model", str(folder), "--num_beams", "2", "--use_cpu"]
    files = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.txt")]
    assert translate_script.main([*common, *files]) == {"sentences": 5}
    assert (tmp_path / "out.txt").read_text() == written
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sentences.encode())))
    capsys.readouterr()
    translate_script.main(common)
    assert capsys.readouterr().out == written


def test_the_stock_class_from_text_files_with_a_tokenizer_of_before(trained, tmp_path):
    folder, _ = trained
    for part, rows in (("train", 20), ("dev", 3)):
        for side, language in (("source", "de"), ("target", "en")):
            text = "".join(f"{text}\n" for text in phrases(rows)[side])
            (tmp_path / f"{part}.{language}").write_text(text, encoding="utf-8")
    files = {part: [str(tmp_path / f"{part}.{language}") for language in ("de", "en")] for part in ("train", "dev")}
    flags = ["--stock", "true", "--tokenizer", str(folder), "--moses", "true", "--dataset", *files["train"]]
    metrics = train(tmp_path / "run", *flags, "--test_dataset", *files["dev"])
    assert isinstance(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run"), MarianMTModel)
    assert "eval_loss" not in metrics
    assert len((tmp_path / "run" / "translations.txt").read_text().split("\n")) == 4


def test_going_on_from_a_trained_model(trained, tmp_path):
    folder, _ = trained
    parts = ["--validation_split", "none", "--test_split", "none", "--learning_rate", "0"]
    metrics = train(tmp_path, "--init_from", str(folder), *parts)
    assert "test" not in metrics
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_broken_off_run_is_not_overwritten_and_goes_on(trained):
    folder, metrics = trained
    again = (*RANKS.split(), "--normalize_before", "true", "--save_strategy", "steps")
    with pytest.raises(ValueError, match="holds checkpoint-4 of an earlier run: set resume_from_checkpoint=true"):
        train(folder, *again)
    assert train(folder, *again, "--resume_from_checkpoint", "true")["parameters"] == metrics["parameters"]


@launches
def test_two_processes_write_what_one_writes(tmp_path):
    flags = [*TINY.split(), "--save_strategy", "no", "--dropout", "0"]
    codes, output = launch(SCRIPTS / "train_translation.py", *flags, "--output_dir", str(tmp_path / "two"))
    assert not any(codes), output
    one = train(tmp_path / "one", "--dropout", "0", "--gradient_accumulation_steps", "2")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (tmp_path / "two" / "translations.txt").read_text() == (tmp_path / "one" / "translations.txt").read_text()
    assert two["test"] == one["test"]
    assert (two["train_loss"], two["eval_loss"]) == pytest.approx((one["train_loss"], one["eval_loss"]), rel=1e-4)


def test_translations_come_in_order_whatever_the_batches():
    tokenizer = tiny_tokenizer()
    model = tiny_marian(tokenizer, dropout=0.3)
    sentences = [*phrases(4)["source"], "", *(source for source, _ in PAIRS), "  "]
    one_by_one = [translate(model, tokenizer, [sentence], num_beams=3)[0] for sentence in sentences]
    assert len(set(one_by_one)) > 6
    assert one_by_one[4] == one_by_one[-1] == ""
    for max_tokens in (100, 4096):
        assert translate(model, tokenizer, sentences, num_beams=3, max_tokens=max_tokens) == one_by_one
    assert model.training
    assert translate(model, tokenizer, []) == []


@pytest.mark.parametrize("num_beams", [1, 3])
def test_every_translation_ends_at_its_own_limit(num_beams):
    tokenizer = tiny_tokenizer()
    model = tiny_marian(tokenizer)
    model.generation_config.num_beams = 4  # what the caller says goes before
    model.final_logits_bias[0, tokenizer.convert_tokens_to_ids("n")] = 50.0
    sentences = [text for pair in PAIRS for text in pair]
    limits = [2 * len(ids) + 10 for ids in tokenizer(sentences)["input_ids"]]
    assert len(set(limits)) > 3
    # The end is the last of the tokens.
    assert translate(model, tokenizer, sentences, num_beams=num_beams) == ["n" * (limit - 1) for limit in limits]


def test_long_sentences_and_no_beams_are_refused():
    tokenizer = tiny_tokenizer()
    model = tiny_marian(tokenizer)
    tokenizer.model_max_length = 5
    with pytest.raises(ValueError, match=r"sentence 2 has \d+ tokens, the model takes 5; shorten or split it"):
        translate(model, tokenizer, ["Ja", PAIRS[1][0]])
    with pytest.raises(ValueError, match="num_beams must be at least 1, got 0"):
        translate(model, tokenizer, ["Ja"], num_beams=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rank_scale 0", r"rank_scale must be above 0 and at most 1, got 0\.0"),
        ("--qk_rank 9", r"qk_rank must be in \[1, 8\], got 9"),
        ("--stock true --rank_scale 0.5 --normalize_before true", "not go with rank_scale, normalize_before"),
        ("--factor_init svd", "svd"),
        ("--factor_init spectral ov=default", "one method, or selector=method each; got 'spectral' among several"),
        ("--languages de", r"languages must be two, source and target, got \['de'\]"),
        ("--num_beams 0", "num_beams must be at least 1"),
        ("--max_tokens 9", r"pairs have more than 9 tokens on a side, first pair \d+: "),
        ("--max_position_embeddings 20", r"of 5 pairs have more than 20 tokens on a side"),
        ("--max_length 1", "max_length must be at least 2"),
        ("--max_length 129", "max_length must be at most 128, the positions of the model, got 129"),
        ("--max_test_pairs 0", "max_test_pairs must be at least 1, got 0"),
        ("--test_dataset ./no.jsonl", r"--test_dataset \./no\.jsonl: no such file or folder"),
        ("--dataset nosuch", "--dataset nosuch: there is no file or folder nosuch, and the Hub could not be asked"),
        ("--init_from nosuch", "--init_from nosuch: there is no folder nosuch"),
        ("--dataset ./nowhere.jsonl", "no such file or folder: nowhere.jsonl"),
        ("--tokenizer ./nowhere", "nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tmp_path / "run", *flags.split())
    assert not (tmp_path / "run").exists()
