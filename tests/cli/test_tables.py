"""What a person sees of the matrices of a model: lines for those alike, in the width of the terminal."""

import io
import re

import pytest
from rich.console import Console

from hf_fnl.cli.groups import groups_of
from hf_fnl.cli.tables import matrices_table
from hf_fnl.cli.terminal import Terminal


def row(name: str, shape=(768, 3072), rank=192, kind="linear") -> dict:
    figures = {"frobenius_norm": 123.456, "effective_rank": 87.65, "energy": 0.9876}
    return {"name": name, "kind": kind, "shape": shape, "rank": rank, "parameters": sum(shape) * rank, **figures}


def names(rows: list[dict]) -> list[str]:
    return [name for name, _ in groups_of(rows)]


def test_layers_of_one_shape_and_place_are_a_group_with_ranges():
    layers = [row(f"layers.{i}.{part}", rank=i + 1) for i in (0, 1, 2, 7) for part in ("q", "up")]
    assert names(layers) == ["layers.0-2,7.q", "layers.0-2,7.up"]
    assert sum(len(members) for _, members in groups_of(layers)) == len(layers)


def test_another_shape_or_kind_is_another_group():
    rows = [row("h.0.fc"), row("h.1.fc", shape=(768, 768)), row("h.2.fc", kind="dense"), row("h.3.fc")]
    assert names(rows) == ["h.0,3.fc", "h.1.fc", "h.2.fc"]


def test_ranges_name_no_layer_that_is_not_there():
    rows = [row(f"stages.{i}.{j}.conv") for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))]
    assert names(rows) == ["stages.0.0-1.conv", "stages.1.0-1.conv", "stages.2.0.conv"]
    assert names(rows[:4]) == ["stages.0-1.0-1.conv"]


BERT = [
    row("bert.embeddings.word_embeddings", (30522, 768), 128, "embedding"),
    *(row(f"bert.embeddings.{name}_embeddings", (512, 768), 512, "dense") for name in ("position", "token_type")),
    *(
        row(f"bert.encoder.layer.{i}.attention.{kind}", (768, 768), 32 + i, kind)
        for i in range(12)
        for kind in ("qk", "ov")
    ),
    *(row(f"bert.encoder.layer.{i}.attention.output.dense", (768, 768), 96 + i) for i in range(12)),
    row("cls.predictions.transform.dense", (768, 768), 768, "dense"),
]


def shown(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(matrices_table(BERT, 110_000_000))
    return console.file.getvalue().splitlines()


def test_the_table_of_a_bert_fits_100_columns_and_ends_with_the_total():
    lines = [line.rstrip() for line in shown(100)]
    assert lines == [line.rstrip() for line in shown(200)]
    assert [line for line in lines if not line.startswith(" ")][2] == "bert.encoder.layer.0-11"
    assert any(line.split()[:6] == ["attention.ov", "ov", "768", "x", "768", "32-43"] for line in lines)
    assert lines[-1].split() == ["all", "40", "matrices", "110,000,000"]


def test_a_narrow_table_folds_names_and_cuts_nothing():
    whole, narrow = shown(100), shown(76)
    assert max(map(len, narrow)) <= 76 < max(map(len, whole))
    figures = re.compile(r"(?<![\w.-])[\d,]*\.?\d+(?![\w.-])")
    assert figures.findall(" ".join(narrow)) == figures.findall(" ".join(whole))


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gives_the_width_and_no_color_is_heard(monkeypatch, no_color):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    Terminal(as_json=False).show({}, matrices_table(BERT, 110_000_000))
    text = screen.getvalue()
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= 80
    assert not re.search(r"\x1b\[[\d;]*3\d", text) or not no_color


def test_what_goes_into_a_pipe_is_plain_and_wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    Terminal(as_json=False).show({}, matrices_table(BERT, 110_000_000))
    assert "\x1b" not in pipe.getvalue()
    assert [line.rstrip() for line in pipe.getvalue().splitlines()] == [line.rstrip() for line in shown(200)]
