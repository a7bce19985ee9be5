"""The command line of a script: options from flags and files, help, suggestions, and how a script ends."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hf_fnl.training import FLAMBeTrainingArguments, command_line
from hf_fnl.training.command_line import (
    UsageError,
    check_at_least,
    named,
    parse_arguments,
    run_script,
    tracked,
)
from hf_fnl.training.runs import write_run
from hf_fnl.utils.files import check_writable
from hf_fnl.utils.suggest import did_you_mean


@dataclass
class Options:
    """What a test asks for."""

    model: str = field(metadata={"help": "Folder of 100 % of a model."})
    width: int = field(default=8, metadata={"help": "Channels."})
    rate: float = field(default=0.5, metadata={"help": "A rate."})
    rank: int | None = field(default=None, metadata={"help": "A rank. Default: none."})
    decay: list[str] = field(default_factory=lambda: ["ov"], metadata={"help": "Kinds."})
    stock: bool = field(default=False, metadata={"help": "Whether."})
    kind: str = field(default="linear", metadata={"help": "A kind."})

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "conv"):
            raise ValueError(f"kind must be one of linear, conv, got {self.kind!r}")


@dataclass
class Arguments(TrainingArguments):
    """Of a Trainer, with an option of ours."""

    optim: str = field(default="flambe", metadata={"help": "An optimizer."})

    def __post_init__(self) -> None:
        pass


def parse(*words: str) -> Options:
    return parse_arguments(words, Options)[0]


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "model: m\nwidth: 3\nrate: 1e-3\nrank: null\ndecay: [qk, ov]\nstock: yes\nkind: conv\n"),
        (
            "a.yml",
            "\ufeffmodel: m\r\nwidth: '3'\r\nrate: .001\r\ndecay:\r\n- qk\r\n- ov\r\nstock: true\r\nkind: conv\r\n",
        ),
        ("a.json", '{"model": "m", "width": 3, "rate": 1e-3, "decay": ["qk", "ov"],\n "stock": true, "kind": "conv"}'),
    ],
    ids=["yaml", "yaml of Windows", "json"],
)
def test_a_file_says_what_flags_would(tmp_path, name, text):
    file = written(tmp_path / name, text)
    flags = parse("--model", "m", "--width", "3", "--rate", "1e-3", "--decay", "qk", "ov", "--stock", "--kind", "conv")
    assert parse(file) == flags == Options("m", 3, 1e-3, None, ["qk", "ov"], True, "conv")


def test_flags_override_a_file(tmp_path):
    file = written(tmp_path / "a.yaml", "model: m\nwidth: 3\ndecay: [qk, ov]\nstock: true\n")
    given = parse(file, "--width", "5", "--decay", "linear", "--stock", "false", "--rank=2")
    assert given == Options("m", 5, 0.5, 2, ["linear"], False)


def test_words_of_a_file_stay_words(tmp_path):
    """YAML takes ``no`` and 1_000 for a truth value and a number."""
    assert parse(written(tmp_path / "a.yaml", "model: no\n")).model == "no"
    assert parse(written(tmp_path / "b.yaml", "model: 2024-01-01\n")).model == "2024-01-01"
    assert parse(written(tmp_path / "c.yaml", "model: 007\ndecay: off\n")) == Options("007", decay=["off"])


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_mappings_of_a_file_are_json_and_null_is_the_default(tmp_path, name):
    file = written(tmp_path / name, '{"fsdp_config": {"version": 2}, "save_total_limit": null, "report_to": []}')
    (args,) = parse_arguments([file, "--seed=3"], Arguments)
    assert (args.fsdp_config, args.save_total_limit, args.report_to, args.seed) == ('{"version": 2}', None, [], 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nwdith: 3", "there is no option wdith; did you mean width?"),
        ("model: m\nwidth: three", "--width: invalid int value: 'three'"),
        ("model: m\nwidth: [3, 4]", "'4' belongs to no option"),
        ("model: m\nwidth: {a: 3}", "--width: invalid int value"),
        ("model: m\nkind: con", "kind must be one of linear, conv, got 'con'"),
        ("width: 3", "the following arguments are required: --model"),
        ("- model", "expected options and their values"),
        ("model: [m", "cannot read the configuration file .*a.yaml"),
    ],
)
def test_a_file_is_refused_by_the_name_of_the_option(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        parse(written(tmp_path / "a.yaml", text))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model"], "--model: expected one argument"),
        (["--width", "3"], "the following arguments are required: --model"),
        (["--model", "m", "--wdith", "3"], "no option --wdith; did you mean --width?"),
        (["--model", "m", "--wid", "3"], "no option --wid; did you mean --width?"),
        (["--model", "m", "--width", "x"], "--width: invalid int value: 'x'"),
        (["--model", "m", "word"], "'word' belongs to no option"),
        (["--model", "m", "a.yaml"], "a configuration file comes first"),
        (["--model", "m", "--qqq=3"], "there is no option --qqq$"),
    ],
)
def test_flags_are_refused_with_a_suggestion(words, message):
    with pytest.raises(UsageError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), []),
        (("--report_to", "tensorboard", "wandb"), ["tensorboard", "wandb"]),
        (("--include_num_input_tokens_seen", "true"), "all"),
        (("--include_num_input_tokens_seen", "False"), "no"),
        (("--include_num_input_tokens_seen", "non_padding"), "non_padding"),
    ],
)
def test_options_of_the_trainer_with_several_forms_are_read_and_read_back(tmp_path, words, expected):
    name = words[0].removeprefix("--") if words else "report_to"
    read = functools.partial(parse_arguments, description=None)
    (args,) = read(["--output_dir", str(tmp_path), "--use_cpu", "true", *words], FLAMBeTrainingArguments)
    assert getattr(args, name) == expected
    write_run(tmp_path, {}, args)
    assert read([str(tmp_path / "run_config.json")], FLAMBeTrainingArguments)[0].to_dict() == args.to_dict()


def test_without_arguments_the_help_is_printed_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments([], Options, Arguments, description="Does it.\n\npython it.py --model m")
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    shown = ("Does it.\n\npython it.py --model m", "Folder of 100 % of a model.", "Channels. (default: 8)")
    for text in (*shown, "--learning_rate", "An optimizer."):
        assert text in printed
    assert "--adam_beta1" not in printed  # one of the Trainer's that few runs set


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        ("ffn_rnk", ["ffn_rank", "qk_rank"], "; did you mean ffn_rank?"),
        ("--lr", ["--learning_rate", "--width"], "; did you mean --learning_rate?"),
        ("--epochs", ["--num_train_epochs", "--width"], "; did you mean --num_train_epochs?"),
        ("Spectral", ["spectral", "default"], "; did you mean spectral?"),
        ("zzz", ["spectral", "default"], ""),
    ],
)
def test_suggestions(given, known, expected):
    assert did_you_mean(given, known) == expected


def test_errors_begin_with_the_option():
    with pytest.raises(FileNotFoundError, match=r"^--train_dataset a b: no such file$"), named("train_dataset", "a b"):
        raise FileNotFoundError("no such file")
    with pytest.raises(ValueError, match=r"^--dataset a\.de a\.en: unequal$"), named("dataset", ["a.de", "a.en"]):
        raise ValueError("unequal")
    with pytest.raises(RuntimeError, match=r"^a defect$"), named("model", "m"):
        raise RuntimeError("a defect")


def test_numbers_are_bounded_by_the_name_of_their_option():
    check_at_least(1, Options("m", width=1), "width", "rank")
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        check_at_least(1, Options("m", width=0), "rank", "width")


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match=f"output_dir {file}/run: {file} is a file"):
        check_writable("output_dir", file / "run")
    check_writable("output_dir", tmp_path / "new" / "run")
    monkeypatch.setattr("os.access", lambda *_: False)  # which root always may
    with pytest.raises(PermissionError, match=f"output_dir .*no permission to write to {tmp_path}"):
        check_writable("output_dir", tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == [file]


def ended(main, capsys, monkeypatch, *words: str, rank: int = 0) -> tuple[int, str]:
    """Exit status of a script, and what it said."""
    monkeypatch.setattr(sys, "argv", ["it.py", *words])
    monkeypatch.setattr(command_line, "_quiet", lambda *, first: None)
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as ending:
        run_script(main)
    return ending.value.code, capsys.readouterr().err


def fails(error: BaseException):
    def main(arguments: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UsageError("width must be 3"), 2, "error: --width must be 3\n"),
        (ValueError("two\n  lines"), 1, "error: two lines\n"),
        (FileNotFoundError("no such file: x"), 1, "error: no such file: x\n"),
        (ImportError('pip install "hf_fnl[vision]"'), 1, 'error: pip install "hf_fnl[vision]"\n'),
        (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["usage", "value", "file", "import", "defect", "Ctrl-C"],
)
def test_how_a_script_ends(capsys, monkeypatch, error, status, message):
    assert ended(fails(error), capsys, monkeypatch, "--width", "4") == (status, message)


def test_debug_shows_the_traceback_and_is_no_argument(capsys, monkeypatch):
    _, said = ended(fails(ValueError("bad")), capsys, monkeypatch, "--debug")
    assert said.startswith("Traceback")
    assert said.endswith("error: bad\n")
    seen: list[str] = []
    words = ["--debug", "--width", "3", "--debug", "underflow_overflow"]
    assert ended(seen.extend, capsys, monkeypatch, *words) == (0, "")
    assert seen == words[1:]


def test_other_processes_say_what_the_first_may_not_know(capsys, monkeypatch):
    assert ended(fails(UsageError("bad")), capsys, monkeypatch, rank=1) == (2, "")
    assert ended(fails(OSError("disk")), capsys, monkeypatch, rank=1) == (1, "process 1: error: disk\n")


def test_tracked_items_are_the_items():
    assert list(tracked(range(3), "counting")) == [0, 1, 2]
    assert list(tracked(iter("ab"), "counting")) == ["a", "b"]


def test_a_training_that_is_interrupted_says_so_in_one_line_and_nothing_that_concerns_no_one(tmp_path):
    """Such as what DeepSpeed, which accelerate imports, says where no accelerator is."""
    script = Path(__file__).parents[2] / "run_scripts" / "train_vision.py"
    flags = "--width 3 --max_train_images 88 --max_eval_images 37 --num_train_epochs 9999 --use_cpu"
    command = [sys.executable, str(script), *flags.split(), "--output_dir", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    # Where this suite itself runs in the background, SIGINT is ignored, and a child would ignore it, too.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, preexec_fn=listening, env=environment) as process:
        while "'loss'" not in (line := process.stdout.readline()):
            assert line or process.poll() is None
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == 130
    assert said == "interrupted\n"
