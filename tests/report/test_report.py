"""Reports: the plots show what was measured, the page stands alone, and its first sentence says what was found."""

from __future__ import annotations

import base64
import json
import math
import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn
from training_cases import tiny_model, tiny_trainer
from typer.testing import CliRunner

from hf_fnl import FactorizedBertForPreTraining
from hf_fnl.attention import find_products
from hf_fnl.cli.app import app
from hf_fnl.optim.diagnostics import diagnose, parameter_count
from hf_fnl.report import inspect_model, write_report
from hf_fnl.report.inspection import Matrix
from hf_fnl.report.page import make_page, summarize
from hf_fnl.report.sections import (
    IN_TRAINING,
    OF_THE_MODEL,
    PALETTE,
    interpolation_section,
    loss_section,
    make_section,
    metrics_section,
    role_of,
)
from hf_fnl.report.sources import Source, read_run, read_sources
from hf_fnl.training.runs import write_run

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs that differ in their weight decay, with models, losses, diagnostics, metrics, settings and a line."""
    folders = tmp_path_factory.mktemp("a") / "run", tmp_path_factory.mktemp("b") / "<b>&amp;"
    for number, folder in enumerate(folders, start=1):
        options = {"frobenius_decay": ["ov", "linear"], "weight_decay": 0.1 * number, "diagnostics_steps": 2}
        trainer = tiny_trainer(folder, **options)
        trainer.train()
        trainer.save_state()
        trainer.save_model()
        write_run(folder, {"parameters": parameter_count(trainer.model), "f1": 12.5}, trainer.args)
        points = [{"t": t, "loss": number * t, "accuracy": 0.9 - t} for t in (0.0, 0.5, 1.0)]
        (folder / "interpolation.json").write_text(json.dumps({"points": points}))
    return folders


@pytest.fixture(scope="module")
def sources(runs) -> list[Source]:
    return read_sources(runs)


@pytest.fixture(scope="module")
def model(runs) -> FactorizedBertForPreTraining:
    return FactorizedBertForPreTraining.from_pretrained(runs[0])


class Page(HTMLParser):
    """Parses a page: its text, headings and images, and whether its elements are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.headings = "", [], []
        self.tags: Counter[str] = Counter()
        self.images: list[dict[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.open += [tag] if tag not in ("meta", "wbr", "img") else []
        self.images += [dict(attributes)] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        self.headings += [data] if self.open[-1:] == ["h3"] else []


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("count", [1, 2])
def test_a_page_stands_alone_and_has_every_chapter(runs, tmp_path, count):
    path = tmp_path / "report.html"
    if count == 1:
        assert write_report(runs[:1], path) == path
    else:  # on the command line
        result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(path), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {"sources": [*map(str, runs)], "out": str(path)}
    page = read(path)
    assert page.tags["h1"] == 1
    assert "http" not in path.read_text()
    assert page.tags["script"] == page.tags["b"] == 0, "names are text"
    for image in page.images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        drawn = base64.b64decode(data)
        assert b"<svg" in drawn
        assert b"mathdefault" not in drawn, "ticks are numbers"
        assert " against " in image["alt"]
    quantities = [quantity.heading for quantity in (*IN_TRAINING, *OF_THE_MODEL)]
    assert page.headings == ["Loss", *quantities, "From the baseline to the model"]
    for words in ("Figures", "All matrices", "bert.encoder.layer.*.attention.ov", "f112.5"):
        assert words in page.text or any(words in image["alt"] for image in page.images)
    assert all(str(run) in page.text for run in runs[:count])
    assert ("adam_beta10.9" in page.text) == (count == 1)
    if count == 2:
        differing = page.text[page.text.index("Settings that differ") :]
        assert "weight_decay0.10.2" in differing
        assert "learning_rate" not in differing


def test_the_first_sentence_says_what_was_found(runs, sources, model):
    count, losses = parameter_count(model), sources[0].losses["training"]
    assert summarize(sources[0]) == (
        f"FactorizedBertForPreTraining with {count['total']:,.0f} parameters, {count['ratio']:.1%} of the dense "
        f"model's {count['dense_equivalent']:,.0f}, in {len(sources[0].matrices)} matrices; training loss from "
        f"{losses[0][1]:.4g} to {losses[-1][1]:.4g} in 6 steps"
    )
    broken = Source("a", traces={"loss": [(10, 2.0), (20, math.nan), (30, math.nan)]})
    assert summarize(broken) == "training loss first not finite at step 20"
    assert Page(make_page([broken])).images, "what is not finite is drawn as far as it is"


def test_plots_of_training_show_the_diagnostics_with_their_range(sources, model):
    expected = diagnose(model, find_products(model, ("linear", "ov")), learning_rate=0.02)
    figures = ("nuclear_norm", "frobenius_norm", "effective_rank", "effective_step_size")
    for quantity, figure in zip(IN_TRAINING, figures, strict=True):
        for panel in make_section(sources, quantity).panels:
            solid = [line for line in panel.lines if not line.dashed]
            assert [line.colour for line in solid] == list(PALETTE[:2])
            assert [step for step, _ in solid[0].points] == [0, 2, 4, 6]
            members = [row[figure] for name, row in expected.items() if role_of(name)[0] == panel.title]
            if panel.title == "all linear products":
                members = [row[figure] for name, row in expected.items() if not name.endswith("ov")]
            if members:
                assert solid[0].points[-1][1] == pytest.approx(sum(members) / len(members), rel=1e-4)
                for step, low, high in solid[0].band[-1:]:
                    assert (step, low, high) == (6, *(pytest.approx(end(members), rel=1e-4) for end in (min, max)))


def test_the_bound_stands_dashed_above_the_nuclear_norm(sources):
    section = make_section(sources[:1], IN_TRAINING[0])
    assert section.meaning.endswith("in their range.")
    for panel in section.panels:
        norm, bound = panel.lines
        assert (norm.label, bound.label, norm.dashed, bound.dashed) == ("nuclear norm", "bound", False, True)
        assert all(y <= z * (1 + 1e-5) for (_, y), (_, z) in zip(norm.points, bound.points, strict=True))


def test_spectra_ranks_and_norms_by_layer_are_those_of_the_model(sources, model):
    products = find_products(model, ("qk",))
    s = torch.stack([torch.linalg.svdvals(p.matrix(model).detach().double())[:, :5] for p in products])
    spectra, ranks, norms = (
        next(panel for panel in make_section(sources[:1], quantity).panels if panel.title.endswith("qk"))
        for quantity in OF_THE_MODEL
    )
    mean = (s / s[..., :1]).mean((0, 1))
    assert spectra.lines[0].points == [(i, pytest.approx(float(v), rel=1e-4)) for i, v in enumerate(mean, start=1)]
    figures = diagnose(model, products)
    rows = [figures[f"bert.encoder.layer.{layer}.attention.qk"] for layer in (0, 1)]
    assert ranks.lines[0].points == [(i, pytest.approx(row["effective_rank"], rel=1e-4)) for i, row in enumerate(rows)]
    assert ranks.lines[1].points == [(0, 5), (1, 5)]
    for line, figure in zip(norms.lines, ("frobenius_norm", "nuclear_norm"), strict=True):
        assert [y for _, y in line.points] == [pytest.approx(row[figure], rel=1e-4) for row in rows]


def test_a_mean_over_different_ranks_is_one_over_all_matrices():
    matrices = [
        Matrix(f"layer.{layer}.dense", "linear", (90, 90), rank, 1, 1, torch.linspace(1, 0.5, 90)[None, :rank])
        for layer, rank in enumerate((65, 66, 90))
    ]
    (panel,) = make_section([Source("a", matrices=matrices)], OF_THE_MODEL[0]).panels
    line = panel.lines[0]
    assert [x for x, _ in line.points] == list(range(1, 66))
    for (i, value), (_, low, high) in zip(line.points, line.band, strict=True):
        assert value == low == high == pytest.approx(1 - 0.5 * (i - 1) / 89)


def test_losses_and_metrics_are_those_that_were_logged(runs, sources):
    history = json.loads((runs[0] / "trainer_state.json").read_text())["log_history"]
    (panel,) = loss_section(sources).panels
    assert panel.lines[0].points == [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    traces = {
        "eval_loss": [(1, 2.0), (2, 1.0)],
        "eval_accuracy": [(1, 0.1), (2, 0.3)],
        "eval_runtime": [(1, 1), (2, 1)],
    }
    first, second = Source("x", traces=traces), Source("y", traces={"loss": [(1, 3.0)], "eval_top5": [(1, 0.5)]})
    assert [(line.label, line.dashed) for line in loss_section([first, second]).panels[0].lines] == [
        ("x evaluation", True),
        ("y training", False),
    ]
    (accuracy,) = metrics_section([first, second]).panels
    assert (accuracy.title, [line.points for line in accuracy.lines]) == ("accuracy", [traces["eval_accuracy"]])


def test_lines_to_a_baseline_are_drawn_one_for_each_run(runs, sources):
    loss, accuracy = interpolation_section([*sources, Source("without")]).panels
    assert (loss.title, accuracy.title, loss.xlabel) == ("loss", "accuracy", "t")
    assert [line.points for line in loss.lines] == [[(t, number * t) for t in (0.0, 0.5, 1.0)] for number in (1, 2)]
    assert [line.label for line in loss.lines] == list(map(str, runs))


@pytest.mark.parametrize(
    ("name", "role", "place"),
    [
        ("decoder.block.11.layer.0.SelfAttention.qk", "decoder.block.*.layer.*.SelfAttention.qk", (11, 0)),
        ("0", "*", (0,)),
        ("layer1.conv2", "layer1.conv2", ()),
    ],
)
def test_the_numbers_of_a_name_are_its_place(name, role, place):
    assert role_of(name) == (role, place)


def test_a_model_or_a_run_alone_has_its_own_chapters(runs, tmp_path):
    tiny_model(stock=True).save_pretrained(tmp_path / "model")
    (tmp_path / "log").mkdir()
    text = (runs[0] / "diagnostics.jsonl").read_text()
    (tmp_path / "log" / "diagnostics.jsonl").write_text(text[:-20])  # a line that is still being written
    for folder, quantities in (("model", OF_THE_MODEL), ("log", IN_TRAINING)):
        page = read(write_report([tmp_path / folder], tmp_path / "report.html"))
        assert page.headings == [quantity.heading for quantity in quantities]
    assert [step for step, _ in read_sources([tmp_path / "log"])[0].history] == [0, 2, 4]


def test_metric_names_with_dollars_and_brackets_are_text():
    source = Source("$a_b$", traces={"eval_$\\frac{1}$ [b]<i>": [(1, 2.0), (2, 1.0)]})
    page = Page(make_page([source]))
    assert page.images[0]["alt"].startswith("$\\frac{1}$ [b]<i>")
    assert "$a_b$" in page.text
    assert page.tags["i"] == 0


def test_phases_follow_each_other_and_checkpoints_stand_in(runs, tmp_path):
    for number in (2, 10):
        shutil.copytree(runs[0], tmp_path / "run" / f"phase-{number}" / "checkpoint-6")
        shutil.copy(runs[0] / "diagnostics.jsonl", tmp_path / "run" / f"phase-{number}")
    (source,) = read_sources([tmp_path / "run"])
    assert [step for step, _ in source.losses["training"]] == list(range(1, 13))
    assert [step for step, _ in source.history] == [0, 2, 4, 6, 6, 8, 10, 12]
    lines = make_section([source], IN_TRAINING[0]).panels[0].lines
    assert all([step for step, _ in line.points] == [0, 2, 4, 6, 8, 10, 12] for line in lines)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda run, tmp: [], ValueError, "needs a run or a model"),
        (lambda run, tmp: [run, run / "."], ValueError, "given more than once"),
        (lambda run, tmp: list("abcdef"), ValueError, "compares up to 5 runs or models, got 6"),
        (lambda run, tmp: [tmp], FileNotFoundError, "holds neither a run .trainer_state.json .* nor a model"),
        (lambda run, tmp: [tmp / "gone"], FileNotFoundError, "there is no folder .*gone"),
    ],
    ids=["none", "twice", "too-many", "empty-folder", "no-folder"],
)
def test_what_cannot_be_reported_leaves_the_target_alone(runs, tmp_path, make, error, message):
    target = tmp_path / "report.html"
    target.write_text("before")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        write_report(make(runs[0], tmp_path / "empty"), target)
    assert target.read_text() == "before"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *((f"{name}.json", "[1,\n") for name in ("trainer_state", "metrics", "run_config", "interpolation")),
        ("trainer_state.json", '{"log_history": [{"loss": 1.0}]}'),
        ("diagnostics.jsonl", "[1,\n"),
        ("interpolation.json", '{"points": [{"loss": 1.0}]}'),
        ("interpolation.json", '{"points": null}'),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, text):
    (tmp_path / "diagnostics.jsonl").write_text("")
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / file} is damaged"):
        read_sources([tmp_path])


def test_the_log_of_a_run_that_goes_on_is_that_of_its_newest_checkpoint(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    for folder, steps in ((tmp_path, 2), (tmp_path / "checkpoint-4", 4)):
        log = [{"step": step, "loss": 1.0} for step in range(1, steps + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": steps, "log_history": log}))
    assert [step for step, _ in read_run(tmp_path)["traces"]["loss"]] == [1, 2, 3, 4]


def test_without_matplotlib_the_extra_is_named_and_tables_still_work(runs, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert len(inspect_model(nn.Sequential(nn.Linear(2, 3)))) == 1
    with pytest.raises(ImportError, match=r'plots are drawn by matplotlib: pip install "hf_fnl\[plots\]"'):
        write_report(runs[:1], tmp_path / "report.html")
