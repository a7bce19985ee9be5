"""What users type: one name for a list, misspelt names, versions and help."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

import hf_fnl
from hf_fnl import (
    FactorizedBertConfig,
    FactorizedBertModel,
    FactorizedGPT2Config,
    FactorizedMarianConfig,
    FLAMBeTrainingArguments,
    RankRule,
    find_products,
)
from hf_fnl.cli import app
from hf_fnl.utils.suggest import as_typed, did_you_mean

CONFIGS = [FactorizedBertConfig, FactorizedGPT2Config, FactorizedMarianConfig]
SIZES = {"hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1, "intermediate_size": 20, "vocab_size": 30}


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ("ov", ["ov"]),
        ("ov,qk", ["ov", "qk"]),
        ("qk ov:encoder", ["qk", "ov:encoder"]),
        (["ov", "linear"], ["ov", "linear"]),
        (("ov",), ("ov",)),
    ],
    ids=str,
)
def test_one_string_of_kinds_is_a_list(tmp_path, given, kinds):
    args = FLAMBeTrainingArguments(tmp_path, use_cpu=True, report_to="none", frobenius_decay=given)
    assert args.frobenius_decay == kinds


@pytest.mark.parametrize("name", ["label_names", "include_for_metrics"])
def test_so_are_the_lists_of_transformers(tmp_path, name):
    args = FLAMBeTrainingArguments(tmp_path, use_cpu=True, report_to="none", **{name: "inputs"})
    assert getattr(args, name) == ["inputs"]


def test_a_misspelt_kind_in_a_string_is_named_whole(tmp_path):
    with pytest.raises(ValueError, match=r"frobenius_decay must be any of .* got 'vo'"):
        FLAMBeTrainingArguments(tmp_path, use_cpu=True, report_to="none", frobenius_decay="vo")


def test_one_kind_is_enough_for_products_and_conversions():
    dense = BertModel(BertConfig(**SIZES))
    model = FactorizedBertModel.from_dense(dense, rule=RankRule(rank=3), kinds="ffn")
    assert (model.config.ffn_rank, model.config.qk_rank) == (3, None)
    assert [product.kind for product in find_products(model, "ov")] == ["ov"]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ffn_rnk", "ffn_rank"),
        ("ffnrank", "ffn_rank"),
        ("qk_ranks", "qk_rank"),
        ("embeding_rank", "embedding_rank"),
        ("factor_int", "factor_init"),
    ],
)
def test_a_misspelt_option_is_refused_with_the_right_name(config, given, meant):
    with pytest.raises(TypeError, match=f"{config.__name__} has .*, got {given}; did you mean {meant}"):
        config(**{given: 3})


def test_a_rank_that_only_another_family_has_is_refused():
    with pytest.raises(TypeError, match="got qkv_rank; did you mean qk_rank"):
        FactorizedBertConfig(qkv_rank=3)
    dense = BertModel(BertConfig(**SIZES))
    with pytest.raises(TypeError, match="got ffn_rnk; did you mean ffn_rank"):
        FactorizedBertModel.from_dense(dense, ffn_rnk=3)


@pytest.mark.parametrize("config", CONFIGS)
def test_what_transformers_keeps_beside_its_fields_stays_possible(config, tmp_path):
    made = config(ffn_rank=3, num_labels=5, id2label={0: "a"}, torch_dtype="float16", my_notes="mine", name_or_path="x")
    made.save_pretrained(tmp_path)
    loaded = config.from_pretrained(tmp_path)
    assert (loaded.my_notes, loaded.ffn_rank, loaded.dtype) == ("mine", 3, torch.float16)


@pytest.mark.parametrize("config", CONFIGS)
def test_printing_shows_every_field_and_saving_keeps_it_loadable(config, tmp_path):
    made = config()
    for field in (*config.rank_options(), "factor_init", "vocab_size", "model_type"):
        assert f'"{field}"' in repr(made)
    assert '"ffn_rank": null' in repr(made)
    made.save_pretrained(tmp_path)
    assert repr(config.from_pretrained(tmp_path)) == repr(made)


@pytest.mark.parametrize(
    ("given", "end"), [("fnn", "; did you mean ffn?"), ("ffn_rnk", "; did you mean ffn?"), ("zzz", ""), ("", "")]
)
def test_only_what_is_alike_is_suggested(given, end):
    assert did_you_mean(given, ["qk", "ov", "ffn"]) == end


# The command line


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("ffn_rank must be at least 1", "--ffn-rank must be at least 1"),
        ("rank must be at least 1", "--rank must be at least 1"),
        ("the rank of ffn_rank", "the rank of --ffn-rank"),  # a word of English is an option at the beginning alone
        ("ffn_rank=3, x.ffn_rank, my-ffn_rank, ffn_ranks\nin", "ffn_rank=3, x.ffn_rank, my-ffn_rank, ffn_ranks in"),
    ],
)
def test_a_message_names_options_as_they_are_typed(message, shown):
    assert as_typed(message, {"ffn_rank": "--ffn-rank", "rank": "--rank"}) == shown


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [(["factorize", "m", "--ration", "0.5"], "--ratio"), (["inspect", "m", "--jsno"], "--json"), (["merg"], "merge")],
    ids=["option", "flag", "command"],
)
def test_a_misspelt_option_or_command_is_an_error_of_usage_with_a_suggestion(arguments, suggestion):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert suggestion in result.stderr


def test_the_version_is_that_of_all_that_matters():
    shown = CliRunner().invoke(app, ["--version"]).stdout
    for name in ("hf_fnl", "torch", "transformers", "accelerate"):
        assert f"{name} {metadata.version(name)}" in shown


COMMANDS = {each.callback.__name__: each.callback for each in app.registered_commands if each.epilog}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_text_as_it_is_written(name):
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "1000", "TERMINAL_WIDTH": "1000"}).stdout
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
    texts = [inspect.getdoc(COMMANDS[name])]
    for parameter in inspect.signature(COMMANDS[name], eval_str=True).parameters.values():
        texts += [info.help for info in getattr(parameter.annotation, "__metadata__", ()) if info.help]
    command = next(c for c in app.registered_commands if c.callback is COMMANDS[name])
    for text in [*texts, command.epilog]:
        assert " ".join(text.split()) in shown


def test_the_command_line_imports_no_torch_to_help(tmp_path):
    program = "import contextlib, sys\nfrom hf_fnl.cli import main\nwith contextlib.suppress(SystemExit): main()\n"
    (tmp_path / "hf-fnl").write_text(f"{program}print(' '.join(sys.modules))")
    words = [sys.executable, tmp_path / "hf-fnl", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "datasets", "numpy", "safetensors", "huggingface_hub", "rich"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())


def test_python_dash_m_is_told_from_other_modules(monkeypatch):
    for orig, argv, expected in (
        (["python", "-m", "hf_fnl", "--help"], ["-m", "--help"], True),
        (["python", "-W", "ignore", "-m", "hf_fnl"], ["-m"], True),
        (["python", "-m", "pytest", "hf_fnl"], ["-m", "hf_fnl"], False),
        (["python", "-m", "pytest", "-m", "hf_fnl"], ["-m", "-m", "hf_fnl"], False),
        (["python", "train.py", "-m", "hf_fnl"], ["train.py", "-m", "hf_fnl"], False),
        (["/bin/python", "/bin/hf-fnl"], ["/bin/hf-fnl"], True),
        (["/bin/python", "/bin/pytest"], ["/bin/hf-fnl"], False),
        (["/bin/python", "/bin/pytest"], ["hf-fnl", "inspect", "bert"], False),
        (["python"], [""], False),
    ):
        monkeypatch.setattr(sys, "orig_argv", orig)
        monkeypatch.setattr(sys, "argv", argv)
        assert hf_fnl._runs_command_line() == expected, orig
