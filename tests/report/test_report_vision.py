"""Reports on image classifiers: figures of the papers from run folders, tables of kernels, operations of an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_fnl import FactorizationConfig, factorize_
from hf_fnl.attention import find_products
from hf_fnl.cli.app import app
from hf_fnl.optim.diagnostics import diagnose
from hf_fnl.report import inspect_model, plot_diagnostics, write_report
from hf_fnl.report.chapters import (
    IN_TRAINING,
    OF_THE_MODEL,
    interpolation_section,
    loss_section,
    make_section,
    metrics_section,
)
from hf_fnl.report.operations import operations
from hf_fnl.report.sources import read_sources
from hf_fnl.vision.models import CifarResNetConfig, CifarResNetForImageClassification, inner_convolutions

pytest.importorskip("matplotlib")

STEPS = (0, 10, 20)
DECAYS = ("none", "weight", "frobenius", "normalized")


def network(**scheme: Any) -> CifarResNetForImageClassification:
    """ResNet8 of width 5 for images of 9 x 9, its inner convolutions factorized unless nothing is said of them."""
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, width=5, image_size=9, num_labels=7)).eval()
    if scheme:
        factorize_(model, FactorizationConfig(kinds=("conv",), include=inner_convolutions(model), **scheme))
    return model


def figures_of(layer: int, step: int, scale: float) -> dict[str, float]:
    """Figures of a product that differ by layer, step and run."""
    norm = scale * (1 + layer + step / 10)
    return {"nuclear_norm": norm, "nuclear_norm_bound": 1.5 * norm, "effective_step_size": 0.1 / norm}


def write_run(folder: Path, *, scale: float = 1.0, names: list[str], kind: str = "conv", **settings: Any) -> Path:
    """A run folder as a training leaves it, without a model, its figures made up."""
    folder.mkdir(parents=True)
    records = [
        {"step": step, "products": {name: figures_of(i, step, scale) for i, name in enumerate(names)}} for step in STEPS
    ]
    log: list[dict[str, Any]] = []
    for epoch, record in enumerate(records):
        rows = list(record["products"].values())
        means = {f"{kind}/{key}": sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        evaluation = {"eval_loss": 3.0 - epoch, "eval_accuracy": scale * epoch / 10, "eval_runtime": 1.0 + epoch}
        log += [
            {"step": record["step"], "epoch": epoch, **entry} for entry in ({"loss": 2.0 - epoch}, means, evaluation)
        ]
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "run_config.json").write_text(json.dumps({"rank_scale": 0.5, "seed": 1, **settings}))
    return folder


def layer_names(depth: int = 20) -> list[str]:
    """The factorized convolutions of a ResNet for CIFAR."""
    blocks = (depth - 2) // 6
    return [
        f"backbone.stages.{stage}.{layer}.conv{number}"
        for stage in range(3)
        for layer in range(blocks)
        for number in (1, 2)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Four runs that differ in their decay."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / str(scale), scale=scale, names=layer_names(), decay=decay)
        for scale, decay in enumerate(DECAYS, start=1)
    ]


def test_nuclear_norms_of_all_convolutions_with_their_bounds_one_line_a_run(runs):
    sources = read_sources(runs)
    panel = make_section(sources, IN_TRAINING[0]).panels[0]
    assert panel.title == "all conv products"
    assert panel.bands == []
    mean = 1 + 17 / 2  # of the layer's part in figures_of
    for scale, decay in enumerate(DECAYS, start=1):
        norms, bounds = (line for line in panel.lines if line.label == f"decay={decay}")
        assert norms.points == [(step, pytest.approx(scale * (mean + step / 10))) for step in STEPS]
        assert bounds.points == [(step, pytest.approx(1.5 * y)) for step, y in norms.points]
        assert (norms.dashed, bounds.dashed) == (False, True)


def test_traces_of_a_comparison_loss_accuracy_and_effective_step_size(runs):
    sources = read_sources(runs)
    accuracy = metrics_section(sources).panels
    assert [panel.title for panel in accuracy] == ["accuracy"], "neither the loss nor the speed is a metric"
    for scale, (decay, line) in enumerate(zip(DECAYS, accuracy[0].lines, strict=True), start=1):
        assert line.label == f"decay={decay}"
        assert line.points == [(step, pytest.approx(scale * epoch / 10)) for epoch, step in enumerate(STEPS)]
    training = [line for line in loss_section(sources).panels[0].lines if not line.dashed]
    assert [line.points for line in training] == [[(0, 2.0), (10, 1.0), (20, 0.0)]] * 4
    steps = make_section(sources, IN_TRAINING[3]).panels[0]
    expected = [sum(0.1 / (2 * (1 + layer)) for layer in range(18)) / 18]
    assert [steps.lines[1].points[0]] == [(0, pytest.approx(expected[0]))]


@pytest.mark.parametrize("depth", [20, 110])
def test_layers_of_a_deep_network_share_plots(tmp_path, depth):
    names = layer_names(depth)
    sources = read_sources([write_run(tmp_path / "run", names=names)])
    section = make_section(sources, IN_TRAINING[0])
    _, *roles = section.panels
    assert [panel.title for panel in roles] == [f"backbone.stages.*.*.conv{number}" for number in (1, 2)]
    assert sorted(line.label for panel in roles for line in panel.lines if not line.bold) == sorted(names)
    colours = [{line.label[:-1]: line.colour for line in panel.lines if not line.bold} for panel in roles]
    assert colours[0] == colours[1], "a place has one colour in all plots"
    assert len(set(colours[0].values())) == len(names) // 2
    last = (depth - 2) // 6 - 1
    assert [key.label for key in section.legend][:4] == [
        "mean",
        "layer 0.0",
        f"layer 1.{(last + 1) // 2}",
        f"layer 2.{last}",
    ]


def test_products_without_a_bound_have_no_dotted_line(tmp_path):
    folder = write_run(tmp_path / "run", names=["stages.0.conv", "stages.1.conv"], kind="tensor")
    for name in ("diagnostics.jsonl", "trainer_state.json"):
        text = (folder / name).read_text().replace("nuclear_norm_bound", "unused")
        (folder / name).write_text(text)
    panels = make_section(read_sources([folder]), IN_TRAINING[0]).panels
    assert [panel.title for panel in panels] == ["all tensor products", "stages.*.conv"]
    assert not any(line.dashed for panel in panels for line in panel.lines)
    assert plot_diagnostics(folder, tmp_path / "plot.png").stat().st_size > 0


def test_evaluations_that_ran_once_are_no_trace(tmp_path):
    folder = write_run(tmp_path / "run", names=["conv"])
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if entry["step"] == 20]
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert metrics_section(read_sources([folder])).panels == []


@pytest.mark.parametrize(
    ("scheme", "kinds"),
    [
        ({}, {"dense": 8}),
        ({"rank": 3, "conv_scheme": "spatial"}, {"dense": 2, "conv": 6}),
        ({"rank": 3, "conv_scheme": "channel"}, {"dense": 2, "conv": 6}),
        ({"rank": 3, "conv_scheme": "tt"}, {"dense": 2, "tensor": 6}),
        ({"rank": 3, "conv_scheme": "tucker"}, {"dense": 2, "tensor": 6}),
    ],
    ids=["dense", "spatial", "channel", "tt", "tucker"],
)
def test_kernels_are_matrices_each_counted_once(scheme, kinds):
    if scheme.get("conv_scheme") in ("tt", "tucker"):
        pytest.importorskip("tltorch")
    model = network(**scheme)
    rows = {row.name: row for row in inspect_model(model)}
    found = [row.kind for row in rows.values()]
    assert {kind: found.count(kind) for kind in set(found)} == kinds
    norms = {"normalization", "bias"}
    weights = [p for name, p in model.named_parameters() if not norms & set(name.split(".")) and p.ndim > 1]
    assert sum(row.parameters for row in rows.values()) == sum(p.numel() for p in weights)
    if scheme:
        for name, figures in diagnose(model, find_products(model)).items():
            assert rows[name].nuclear_norm == pytest.approx(figures["nuclear_norm"], rel=1e-4)
            assert rows[name].rank == 3


@pytest.mark.parametrize("scheme", ["tt", "tucker"])
def test_a_tensorized_kernel_has_the_spectrum_of_its_unfolding(scheme):
    pytest.importorskip("tltorch")
    model = network(rank=3, conv_scheme=scheme)
    for row in inspect_model(model):
        if row.kind == "tensor":
            matrix = model.get_submodule(row.name).dense_weight().detach().double().flatten(1)
            s = torch.linalg.svdvals(matrix)
            assert row.shape == tuple(matrix.shape)
            assert row.frobenius_norm == pytest.approx(float(s.norm()))
            assert row.effective_rank == pytest.approx(float(s.sum() / s[0]))


def test_operations_are_those_of_one_image():
    shapes = [(5, 3, 9), *[(5, 5, 9)] * 2, (10, 5, 5), (10, 10, 5), (20, 10, 3), (20, 20, 3)]
    convolutions = sum(2 * 9 * size * size * out * inner for out, inner, size in shapes)
    model = network()
    assert operations(model) == {"FLOPs per image": convolutions + 2 * 20 * 7}
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_a_page_about_a_classifier(tmp_path, runs):
    folder = write_run(tmp_path / "run", names=layer_names(8), decay="frobenius")
    network(rank=3).save_pretrained(folder)
    text = write_report([folder], tmp_path / "one.html").read_text()
    assert "FLOPs per image" in text
    assert "FLOPs per token /" not in text
    assert "accuracy against step" in text
    assert "no trainer_state" not in text
    (spectra,) = (make_section(read_sources([folder]), quantity) for quantity in OF_THE_MODEL[:1])
    assert "backbone.stages.*.*.conv1" in {panel.title for panel in spectra.panels}


def test_five_runs_are_compared_on_the_command_line(runs, tmp_path):
    more = write_run(tmp_path / "more", names=layer_names(), decay="crs")
    out = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", *map(str, runs), str(more), "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sources"] == [*map(str, runs), str(more)]
    assert "Comparison: decay=none, decay=weight, decay=frobenius, decay=normalized and decay=crs" in out.read_text()


def write_line(folder: Path, points: list[Any]) -> Path:
    (folder / "interpolation.json").write_text(json.dumps({"points": points, "baseline": "dense"}))
    return folder


def test_lines_to_a_baseline_are_drawn_one_for_each_run(tmp_path, runs):
    lines = {
        "scratch": [{"t": t, "loss": 3 * t * (1 - t), "accuracy": 0.9 - t} for t in (0.0, 0.5, 1.0)],
        "dense-first": [{"t": t, "loss": t * (1 - t), "accuracy": 0.9} for t in (0.0, 0.5, 1.0)],
    }
    folders = [write_line(write_run(tmp_path / name, names=["conv"]), points) for name, points in lines.items()]
    sources = read_sources([folders[0], runs[0], folders[1]])
    section = interpolation_section(sources)
    assert [panel.title for panel in section.panels] == ["loss", "accuracy"]
    for panel in section.panels:
        for name, line, source in zip(lines, panel.lines, sources[::2], strict=True):
            assert line.label == source.name
            assert line.points == [(point["t"], point[panel.title]) for point in lines[name]]
    text = write_report(folders, tmp_path / "report.html").read_text()
    assert "loss against t" in text
    assert ">0.2</text>" in text, "ticks between 0 and 1"


def test_without_a_line_there_is_no_chapter(tmp_path, runs):
    assert "Interpolation" not in write_report(runs[:1], tmp_path / "report.html").read_text()


@pytest.mark.parametrize("points", [[{"loss": 1.0}], [1], None], ids=["no-t", "number", "nothing"])
def test_a_damaged_line_is_named(tmp_path, points):
    folder = write_line(write_run(tmp_path / "run", names=["conv"]), points)
    with pytest.raises(ValueError, match=f"{folder / 'interpolation.json'} is damaged"):
        read_sources([folder])
