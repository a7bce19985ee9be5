"""``hf-fnl train`` and the other programs, which are those of ``run_scripts/``."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hf_fnl.cli import app
from hf_fnl.scripts import PROGRAMS
from hf_fnl.training import command_line

ROOT = Path(__file__).parents[2]


def shown(*arguments: str) -> str:
    """What ``hf-fnl`` prints on stdout or stderr, without colours."""
    return CliRunner().invoke(app, arguments, env={"NO_COLOR": "1"}).output


def help_of(name: str) -> str:
    main = importlib.import_module(f"hf_fnl.scripts.{PROGRAMS[name].module}").main
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        main(["--help"])
    return text.getvalue()


def test_every_command_has_a_line():
    text = shown("--help")
    for command in app.registered_commands:
        assert f"\n  {command.name or command.callback.__name__} " in text
    assert "\n  train " in text


def test_train_lists_what_it_trains():
    text = shown("train")
    assert all(f"hf-fnl {name} " in text for name in PROGRAMS if name.startswith("train "))
    assert "Did you mean 'clm'" in shown("train", "clmm")


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_takes_its_example(name):
    options = set(re.findall(r"--\w+", help_of(name)))
    assert set(re.findall(r"--\w+", PROGRAMS[name].example)) <= options


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_file_of_a_checkout_is_the_same_program(name):
    module = PROGRAMS[name].module
    path = ROOT / "run_scripts" / f"{module}.py"
    assert f'PROGRAMS["{name}"].run()' in path.read_text()


def test_a_program_gets_its_arguments_as_they_stand(monkeypatch):
    monkeypatch.setattr(command_line, "_quiet", lambda *, first: None)
    monkeypatch.setattr(sys, "argv", [])
    done = CliRunner().invoke(app, ["train", "vision", "--wdith", "3", "--", "-x"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.strip() == "error: there is no option --wdith; did you mean --width?"


def test_a_report_knows_the_models_of_images_where_the_public_names_are_not_imported():
    assert "\nimport hf_fnl.vision.models" in (ROOT / "hf_fnl" / "report" / "sources.py").read_text()
