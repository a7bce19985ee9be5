"""Reports: the plots show what was measured, the page stands alone, and its first sentence says what was found."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from training_cases import tiny_model, tiny_trainer

from hf_fnl import FactorizedBertForPreTraining
from hf_fnl.attention import find_products
from hf_fnl.optim.diagnostics import diagnose, parameter_count
from hf_fnl.report import plot_diagnostics, plot_loss, write_report
from hf_fnl.report.chapters import IN_TRAINING, OF_THE_MODEL, loss_section, make_section
from hf_fnl.report.drawing import draw_svg
from hf_fnl.report.inspection import Spectrum
from hf_fnl.report.names import labels
from hf_fnl.report.page import make_page
from hf_fnl.report.panels import PALETTE
from hf_fnl.report.series import role_of
from hf_fnl.report.sources import Source, read_sources
from hf_fnl.report.summary import summarize
from hf_fnl.training.runs import finish_run

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "wbr", "use", "path"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with its model, losses, diagnostics, metrics and settings."""
    return _train(tmp_path_factory.mktemp("first") / "run", frobenius_decay=["ov", "linear"])


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """One with the same name, another weight decay, and another last value of everything."""
    return _train(tmp_path_factory.mktemp("second") / "run", frobenius_decay=["ov", "linear"], weight_decay=0.3)


def _train(folder: Path, **options) -> Path:
    trainer = tiny_trainer(folder, diagnostics_steps=2, **options)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    finish_run(folder, {"parameters": parameter_count(trainer.model), "f1": 12.5}, trainer.args)
    return folder


class Page(HTMLParser):
    """Parses a page: its text, and whether its elements are closed, its ids unique and its references inside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []
        self.tags, self.ids, self.classes = Counter(), Counter(), Counter()
        self.references: set[str] = set()
        self.images: list[str | None] = []
        self.headings: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self.ids.update([values["id"]] if "id" in values else [])
        self.classes[values.get("class")] += 1
        self.references |= {value for key, value in attributes if key in ("href", "src", "xlink:href")}
        if tag == "svg":
            self.images.append(values.get("aria-label"))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text += data
        if self.open[-1:] == ["h3"]:
            self.headings.append(data)


@pytest.mark.parametrize("compared", [False, True], ids=["one", "two"])
def test_a_page_stands_alone(run, other_run, tmp_path, compared):
    path = write_report([run, other_run] if compared else [run], tmp_path / "report.html")
    page = Page(path)
    assert page.open == []
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert {reference for reference in page.references if reference[1:] not in page.ids} == set()
    assert "http" not in path.read_text()
    assert page.tags["script"] == 0
    assert page.tags["h1"] == 1
    assert len(page.images) == page.tags["figure"] > 0
    assert all(image and " against " in image for image in page.images)


def test_a_report_has_every_chapter(run, tmp_path):
    page = Page(write_report([run], tmp_path / "report.html"))
    text = page.text
    quantities = [quantity.heading for quantity in (*IN_TRAINING, *OF_THE_MODEL)]
    for heading in ("Figures", "Loss and metrics", *quantities, "All matrices", "Settings"):
        assert heading in text
    assert "bert.encoder.layer.*.attention.ov" in text
    assert "f112.5" in text


def test_a_comparison_names_both_and_what_differs(run, other_run, tmp_path):
    text = Page(write_report([run, other_run], tmp_path / "report.html")).text
    assert "weight_decay=0.1 and weight_decay=0.3" in text
    assert all(str(folder) in text for folder in (run, other_run))
    differing = text[text.index("Settings that differ") :]
    assert "weight_decay0.10.3" in differing
    assert not {"learning_rate", "output_dir"} & set(re.split(r"[^a-z_]+", differing))
    sources = read_sources([run, other_run])
    for quantity in (*IN_TRAINING, *OF_THE_MODEL):
        for panel in make_section(sources, quantity).panels:
            assert {line.colour for line in panel.lines} == set(PALETTE[:2])


def test_plots_of_training_show_the_diagnostics(run):
    (source,) = read_sources([run])
    model = FactorizedBertForPreTraining.from_pretrained(run)
    expected = diagnose(model, find_products(model, ("linear", "ov")), learning_rate=0.02)
    figures = ("nuclear_norm", "frobenius_norm", "effective_rank", "effective_step_size")
    for quantity, figure in zip(IN_TRAINING, figures, strict=True):
        panels = make_section([source], quantity).panels
        thin = {line.label: line.points for panel in panels for line in panel.lines if not line.bold}
        assert set(thin) == set(expected)
        for name, points in thin.items():
            assert [step for step, _ in points] == [0, 2, 4, 6]
            assert points[-1][1] == pytest.approx(expected[name][figure], rel=1e-4)


def test_means_ranges_and_the_bound_of_a_comparison(run, other_run):
    sources = read_sources([run, other_run])
    panels = [panel for panel in make_section(sources, IN_TRAINING[0]).panels if panel.bands]
    assert len(panels) == 3, "one for each role"
    for panel in panels:
        for source, band in zip(sources, panel.bands, strict=True):
            step, products = source.history[-1]
            members = [figures for name, figures in products.items() if role_of(name)[0] == panel.title]
            norms = [figures["nuclear_norm"] for figures in members]
            solid, dashed = (line for line in panel.lines if line.colour == band.colour)
            assert band.points[-1] == (step, min(norms), max(norms))
            assert solid.points[-1] == (step, pytest.approx(sum(norms) / len(norms)))
            bounds = [figures["nuclear_norm_bound"] for figures in members]
            assert dashed.points[-1] == (step, pytest.approx(sum(bounds) / len(bounds)))
            assert all(low[1] <= high[1] * (1 + 1e-5) for low, high in zip(solid.points, dashed.points, strict=True))


def test_spectra_are_those_of_the_model(run):
    (source,) = read_sources([run])
    model = FactorizedBertForPreTraining.from_pretrained(run)
    panels = make_section([source], OF_THE_MODEL[0]).panels
    lines = {line.label: line.points for panel in panels for line in panel.lines if not line.bold}
    product = find_products(model, ("ov",))[1]
    s = torch.linalg.svdvals(product.matrix(model).detach().double())[:, :6]
    expected = (s / s[:, :1]).mean(0)
    assert lines[product.name] == [(i, pytest.approx(float(v), rel=1e-4)) for i, v in enumerate(expected, start=1)]


def test_effective_ranks_and_ranks_by_layer(run):
    (source,) = read_sources([run])
    model = FactorizedBertForPreTraining.from_pretrained(run)
    figures = diagnose(model, find_products(model, ("qk",)))
    (panel,) = (p for p in make_section([source], OF_THE_MODEL[1]).panels if p.title.endswith("qk"))
    effective, ranks = panel.lines
    expected = [figures[f"bert.encoder.layer.{layer}.attention.qk"]["effective_rank"] for layer in (0, 1)]
    assert effective.points == [(layer, pytest.approx(value, rel=1e-4)) for layer, value in enumerate(expected)]
    assert ranks.points == [(0, 5), (1, 5)]


def test_losses_are_those_that_were_logged(run):
    (line,) = loss_section(read_sources([run])).panels[0].lines
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert line.points == [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def test_means_over_a_kind_are_those_of_all_its_products(run, other_run):
    sources = read_sources([run, other_run])
    (panel,) = (p for p in make_section(sources, IN_TRAINING[0]).panels if p.title == "all linear products")
    for source, line in zip(sources, (line for line in panel.lines if not line.dashed), strict=True):
        for step, products in source.history:
            norms = [figures["nuclear_norm"] for name, figures in products.items() if not name.endswith("ov")]
            assert dict(line.points)[step] == pytest.approx(sum(norms) / len(norms), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "role", "place"),
    [
        ("encoder.layer.3.attention.ov", "encoder.layer.*.attention.ov", (3,)),
        ("decoder.block.11.layer.0.SelfAttention.qk", "decoder.block.*.layer.*.SelfAttention.qk", (11, 0)),
        ("0", "*", (0,)),
        ("layer1.conv2", "layer1.conv2", ()),
    ],
)
def test_the_numbers_of_a_name_are_its_place(name, role, place):
    assert role_of(name) == (role, place)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"decay": "frobenius"}, {"decay": "weight"}], ["decay=frobenius", "decay=weight"]),
        (
            [{"ratio": None, "seed": 1, "bf16": True}, {"ratio": 0.1, "seed": 1, "bf16": False}],
            ["ratio unset", "ratio=0.1"],
        ),
        ([{"rank_scale": 0.5, "seed": 2}, {"rank_scale": 0.5, "seed": 1}], ["seed=2", "seed=1"]),
        ([{"factor_init": ["a", "b"]}, {"factor_init": ["c"]}], ["factor_init=a+b", "factor_init=c"]),
        ([{"seed": 1}, {"seed": 1}], ["x", "y"]),
        ([{"seed": 1}, {}], ["x", "y"]),
        ([{"model": "runs/" + 48 * "a"}, {"model": "b"}], ["x", "y"]),
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], ["x", "y", "z"]),
        ([{"seed": 1}], ["x"]),
    ],
    ids=["decay", "not-given", "seed", "list", "same", "no-run", "too-long", "not-told-apart", "one"],
)
def test_runs_are_called_by_the_settings_in_which_they_differ(settings, expected):
    assert labels(settings, list("xyz"[: len(settings)])) == expected


def test_a_model_alone_has_the_chapters_of_a_model(tmp_path):
    model = tiny_model(stock=True)
    model.save_pretrained(tmp_path / "model")
    page = Page(write_report([tmp_path / "model"], tmp_path / "report.html"))
    assert f"model: {type(model).__name__} with {parameter_count(model)['total']:,.0f} parameters, in" in page.text
    assert "trainer_state" not in page.text
    assert "Products in training" not in page.text
    assert page.headings == [quantity.heading for quantity in OF_THE_MODEL]
    assert page.images


def test_a_run_alone_has_the_chapters_of_a_run(run, tmp_path):
    (tmp_path / "log").mkdir()
    shutil.copy(run / "diagnostics.jsonl", tmp_path / "log")
    page = Page(write_report([tmp_path / "log"], tmp_path / "report.html"))
    assert "log: trained for 6 steps." in page.text
    assert "weights" not in page.text
    assert page.headings == [quantity.heading for quantity in IN_TRAINING]
    assert "All matrices" not in page.text


def test_the_first_sentence_says_what_was_found_and_the_title_is_the_folder(run, tmp_path):
    path = write_report([run], tmp_path / "report.html")
    model = FactorizedBertForPreTraining.from_pretrained(run)
    count = parameter_count(model)
    (source,) = read_sources([run])
    losses = source.losses["training"]
    found = (
        f"run: FactorizedBertForPreTraining with {count['total']:,.0f} parameters, {count['ratio']:.1%} of the dense "
        f"model's {count['dense_equivalent']:,.0f}, in {len(source.spectra)} matrices; trained for 6 steps, training "
        f"loss from {losses[0][1]:.4g} to {losses[-1][1]:.4g}; f1 12.5. "
    )
    assert found in Page(path).text
    assert f"<h1>{run.name}</h1>" in path.read_text()


def test_settings_that_somebody_chose_come_first(run, tmp_path):
    text = Page(write_report([run], tmp_path / "report.html")).text
    chosen, _, rest = text.partition("Settings at their defaults")
    chosen = chosen[: chosen.index("Figures")]
    assert "learning_rate0.02" in chosen
    assert 'frobenius_decay["ov", "linear"]' in chosen
    assert "adam_beta1" not in chosen
    assert "adam_beta10.9" in rest


@pytest.mark.parametrize(
    ("losses", "log"),
    [
        ([8 - 0.05 * step for step in range(100)], False),
        ([8 * 0.97**step for step in range(100)], False),
        ([*(3 - 0.01 * step for step in range(99)), 4_000.0], True),
        ([*(3 - 0.01 * step for step in range(99)), math.inf], False),
        ([-1.0, *(3 - 0.01 * step for step in range(99)), 4_000.0], False),
        ([3.0, 2.0], False),
        ([5.0] * 50, False),
    ],
    ids=["line", "decay", "spike", "infinite", "negative", "two", "constant"],
)
def test_the_loss_is_logarithmic_only_where_a_spike_flattens_it(losses, log):
    points = list(enumerate(losses, start=1))
    (panel,) = loss_section([Source("a", "a", traces={"loss": points})]).panels
    assert (panel.log, panel.wide) == (log, True)


def test_legends_name_what_is_drawn_and_nothing_else():
    first = Source("first", "a", traces={"loss": [(1, 2.0), (2, 1.0)]})
    second = Source("second", "b", traces={"loss": [(1, 2.0)], "eval_loss": [(1, 2.0)]})
    third = Source("third", "c")
    assert [key.label for key in loss_section([first]).legend] == []
    assert [key.label for key in loss_section([second]).legend] == ["training", "evaluation"]
    assert [key.label for key in loss_section([first, third, second]).legend][:2] == ["first", "second"]


def test_a_loss_that_is_not_finite_is_said():
    source = Source("a", "a", traces={"loss": [(10, 2.0), (20, math.nan), (30, math.nan)]})
    assert summarize(source) == "trained for 30 steps, training loss not finite from step 20 on."
    assert draw_svg(loss_section([source]).panels[0], 1).startswith("<svg")


def test_metric_names_with_dollars_and_brackets_are_text(tmp_path):
    name = "eval_$\\frac{1}$ [b]<i>"
    source = Source("$a_b$", "a", traces={name: [(1, 2.0), (2, 1.0)]})
    page = tmp_path / "page.html"
    page.write_text(make_page([source]), encoding="utf-8")
    parsed = Page(page)
    assert parsed.open == []
    assert "$\\frac{1}$ [b]<i>" in parsed.text
    assert "$a_b$" in parsed.text
    assert parsed.tags["i"] == 0


def test_phases_follow_each_other_and_checkpoints_stand_in(run, tmp_path):
    for number in (2, 10):
        shutil.copytree(run, tmp_path / "run" / f"phase-{number}" / "checkpoint-6")
        shutil.copy(run / "diagnostics.jsonl", tmp_path / "run" / f"phase-{number}")
    (source,) = read_sources([tmp_path / "run"])
    assert [step for step, _ in source.losses["training"]] == list(range(1, 13))
    assert [step for step, _ in source.history] == [0, 2, 4, 6, 6, 8, 10, 12]


def test_a_line_that_is_still_being_written_is_left_out(run, tmp_path):
    (tmp_path / "run").mkdir()
    text = (run / "diagnostics.jsonl").read_text()
    (tmp_path / "run" / "diagnostics.jsonl").write_text(text[:-20])
    assert [step for step, _ in read_sources([tmp_path / "run"])[0].history] == [0, 2, 4]


def test_names_are_text_not_markup(run, tmp_path):
    odd = Path(shutil.copytree(run, tmp_path / '<b>"&amp;'))
    path = write_report([odd, run], tmp_path / "report.html")
    page = Page(path)
    assert '<b>"&amp;' in page.text
    assert page.tags["b"] == 2, "only those around the names"
    assert any('<b>"&amp;' in image for image in page.images)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda run, tmp: [], ValueError, "needs a run or a model"),
        (lambda run, tmp: [run, run / "."], ValueError, "given more than once"),
        (
            lambda run, tmp: list("abcdef"),
            ValueError,
            "compares up to 5 runs or models, got 6",
        ),
        (lambda run, tmp: [tmp], FileNotFoundError, "holds neither a run .trainer_state.json .* nor a model"),
        (lambda run, tmp: [tmp / "gone"], FileNotFoundError, "there is no folder .*gone"),
    ],
    ids=["none", "twice", "too-many", "empty-folder", "no-folder"],
)
def test_what_cannot_be_reported_leaves_the_target_alone(run, tmp_path, make, error, message):
    target = tmp_path / "report.html"
    target.write_text("before")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        write_report(make(run, tmp_path / "empty"), target)
    assert target.read_text() == "before"


@pytest.mark.parametrize("file", ["trainer_state.json", "diagnostics.jsonl", "metrics.json", "run_config.json"])
def test_a_damaged_file_is_named(run, tmp_path, file):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / file).write_text("[1,\n")
    with pytest.raises(ValueError, match=f"{folder / file} is damaged"):
        write_report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_pictures_of_a_run(run, tmp_path):
    for plot in (plot_loss, plot_diagnostics):
        picture = plot(run, tmp_path / "plots" / f"{plot.__name__}.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("plot", "missing"),
    [(plot_loss, "trainer_state.json"), (plot_diagnostics, "diagnostics.jsonl")],
    ids=["loss", "products"],
)
def test_a_folder_without_a_run_is_named(tmp_path, plot, missing):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no {missing}"):
        plot(tmp_path, tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_without_matplotlib_the_extra_is_named_and_tables_still_work():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from torch import nn\nfrom hf_fnl.report import inspect_model, write_report\n"
        "assert len(inspect_model(nn.Sequential(nn.Linear(2, 3)))) == 1\n"
        "try: write_report(['anything'], 'report.html')\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'hf_fnl[plots]'" in done.stdout


def test_a_mean_over_different_ranks_is_one_over_all_matrices():
    spectra = [
        Spectrum(f"layer.{layer}.dense", "linear", (900, 900), rank, 1, 1, torch.linspace(1, 0.5, 900)[None, :rank])
        for layer, rank in enumerate((650, 651, 900))
    ]
    sources = [Source(name, name, spectra=spectra) for name in ("a", "b")]
    for panel in make_section(sources, OF_THE_MODEL[0]).panels:
        solid = [line for line in panel.lines if not line.dashed]
        for line, band in zip(solid, panel.bands, strict=True):
            assert len(line.points) <= 200
            assert (line.points[0][0], line.points[-1][0]) == (1, 650)
            for (i, value), (_, low, high) in zip(line.points, band.points, strict=True):
                assert value == low == high == pytest.approx(1 - 0.5 * (i - 1) / 899)
