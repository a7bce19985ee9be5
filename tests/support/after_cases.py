"""What users do next with the folder that a script wrote."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from typer.testing import CliRunner

from hf_fnl import load
from hf_fnl.cli.app import app
from hf_fnl.layers import factorized_layers
from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.cards import model_card
from hf_fnl.training.command_line import parse_arguments
from hf_fnl.training.runs import run_settings


def hf_fnl(*arguments: object) -> str:
    """What a command prints; it must end well."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def check_next_steps(folder: Path, out: Path) -> dict[str, Any]:
    """Merge, inspect, report and write a card of a script's output; returns what inspect says."""
    out.mkdir()
    model = load(folder)
    if isinstance(model, FactorizedPreTrainedModel) or factorized_layers(model):
        hf_fnl("merge", folder, "--out", out / "merged")
        assert not AutoConfig.from_pretrained(out / "merged").architectures[0].startswith("Factorized")
        assert "# merged" in (out / "merged" / "README.md").read_text()
    hf_fnl("report", folder, "--out", out / "report.html")
    assert "image/svg+xml" in (out / "report.html").read_text()
    card = model_card(model, name="someone/model", record=folder)
    (out / "card.md").write_text(str(card))
    return json.loads(hf_fnl("inspect", folder, "--json"))


def check_settings(folder: Path, *classes: type, found_by_the_run: Collection[str] = ()) -> None:
    """The settings that a script wrote are those that it reads back, and flags override them."""
    file = folder / "run_config.json"
    written = json.loads(file.read_text())
    read = run_settings(*parse_arguments([str(file)], *classes))
    assert {name for name in written if read[name] != written[name]} == set(found_by_the_run)
    changed = run_settings(*parse_arguments([str(file), "--seed", "7"], *classes))
    assert {name for name in written if changed[name] != read[name]} == {"seed"}
