"""Rows of published tables: how they are read, become trainings, and stand beside the paper's numbers."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import run_experiments
import yaml
from experiment_cases import DATASETS, ROWS, STAND_IN, TABLE, row
from transformers import HfArgumentParser

from benchmarks.experiments.metrics import measure
from benchmarks.experiments.rows import SCALES, read_rows
from benchmarks.experiments.runs import ROOT, Launch, data_places
from benchmarks.harness.grids import run_once
from benchmarks.harness.record import revision
from hf_fnl.scripts import train_clm, train_translation, train_vision
from hf_fnl.vision.image_batches import ImageOptions
from hf_fnl.vision.image_training import ImageTrainingArguments

PUBLISHED = ROOT / "run_scripts" / "experiments"
PAPERS = ROOT.parent / "shared" / "papers"


@pytest.fixture
def table(tmp_path):
    """Writes a table and returns its folder."""

    def write(rows=ROWS, datasets=DATASETS, **changes) -> Path:
        folder = tmp_path / "experiments" / "table9"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "_datasets.yaml").write_text(yaml.safe_dump(datasets))
        for name, content in {"_table": TABLE | changes, **rows}.items():
            text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        return folder

    return write


@pytest.fixture
def run(tmp_path):
    """Runs the runner with a stand-in for the training script."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "birds").mkdir()

    def main(*words, scale="full", seeds=(1, 2), data=True, extra=()) -> dict:
        place = ["--data", f"birds={tmp_path / 'birds'}"] if data else []
        folders = ["--runs", tmp_path / "runs", "--out", tmp_path / "out", "--script", tmp_path / "stand_in.py"]
        arguments = [
            *words,
            "--scale",
            scale,
            "--seeds",
            *seeds,
            *place,
            *folders,
            *(["--extra", *extra] if extra else []),
        ]
        return run_experiments.main([str(word) for word in arguments])

    return main


def result(tmp_path, name="table9") -> dict:
    return json.loads((tmp_path / "out" / f"{name}.json").read_text())


def test_the_nearer_settings_win(table):
    columns = {"birds_10": {"data": "birds", "epochs": 100, "width": 5}}
    rows = {"one": row(settings={"width": 7, "milestones": None}, small={"nesterov": True})}
    (only,) = read_rows([table(rows, columns=columns, small={"epochs": 3, "width": 2})])
    assert only.flags("birds_10", "full") == {"eval_split": "test", "epochs": 100, "width": 7}
    assert only.flags("birds_10", "small") == {"eval_split": "test", "epochs": 3, "width": 2, "nesterov": True}


@pytest.mark.parametrize(
    ("paper", "published"),
    [
        pytest.param(None, {"accuracy": None, "top5": None}, id="none"),
        pytest.param("9 ± 1", {"accuracy": "9 ± 1", "top5": None}, id="first-metric"),
        pytest.param({"top5": 8.5, "accuracy": 7}, {"accuracy": 7, "top5": 8.5}, id="all-metrics"),
    ],
)
def test_a_published_value_belongs_to_a_metric(table, paper, published):
    (only,) = read_rows([table({"one": row(paper={"birds_10": paper})}, metrics=["accuracy", "top5"])])
    assert only.published("birds_10") == published


def test_rows_are_read_once_each(table):
    folder = table({"a": row(), "b": row()})
    assert [found.name for found in read_rows([folder / "b.yaml", folder])] == ["b", "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"rows": {"one": row(hue=1)}}, "one.yaml: unknown key 'hue'; allowed are row, paper", id="row-key"
        ),
        pytest.param({"hue": 1}, "_table.yaml: unknown key 'hue'", id="table-key"),
        pytest.param({"datasets": {"birds": {"at": 1}}}, "_datasets.yaml: unknown key 'at'", id="data-set-key"),
        pytest.param({"rows": {"one": {"row": "x"}}}, "one.yaml: paper is missing", id="missing-key"),
        pytest.param({"rows": {"one": ["x"]}}, "one.yaml must hold a mapping, got list", id="no-mapping"),
        pytest.param(
            {"rows": {"one": row(paper={"cats": 1})}}, "table9/one: no column 'cats'; .* birds_10", id="column"
        ),
        pytest.param({"columns": {"c": {"data": "cats"}}}, "c must be one of birds, fish, got 'cats'", id="data"),
        pytest.param({"metrics": ["rouge"]}, "metrics must be any of accuracy, .*, got 'rouge'", id="metric"),
    ],
)
def test_files_that_are_wrong_are_refused(table, changes, message):
    with pytest.raises(ValueError, match=message):
        read_rows([table(**changes)])


def test_a_file_that_is_no_yaml_is_refused(table):
    folder = table()
    (folder / "dense.yaml").write_text("row: [")
    with pytest.raises(ValueError, match=r"dense\.yaml is no YAML"):
        read_rows([folder])


@pytest.mark.parametrize(
    ("place", "message"),
    [
        pytest.param("table8", r"no such table or row: .*table8; there are table9; did you mean table9\?$", id="table"),
        pytest.param("table9/sparse.yaml", "no such table or row: .*sparse.yaml; there are dense.yaml;", id="row"),
        pytest.param("", "no such table or row: .*experiments; there are table9$", id="folder-of-tables"),
    ],
)
def test_unknown_tables_and_rows_are_refused(table, place, message):
    with pytest.raises(FileNotFoundError, match=message):
        read_rows([table().parent / place])


@pytest.mark.parametrize(
    ("place", "data"),
    [
        pytest.param({"birds": "../birds"}, {"--dataset": "../birds", "--eval_split": "test"}, id="folder"),
        pytest.param({"birds": None}, {"--dataset": "someone/birds", "--eval_split": "valid"}, id="hub"),
    ],
)
def test_flags_of_a_training(table, tmp_path, place, data):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    rows = read_rows([table({"one": row(settings={"nesterov": True, "milestones": [0.5, 0.75]})})])
    launch = Launch(script=tmp_path / "stand_in.py", runs=tmp_path, places=place, extra={"width": 3})
    (run,) = launch.plan(rows, [7])
    command = " ".join(run.command)
    assert " --milestones 0.5 0.75 --" in command
    assert " --nesterov true " in command
    assert " --width 3 " in command
    assert command.endswith(" --resume_from_checkpoint true")
    assert all(f" {flag} {value} " in command for flag, value in data.items())
    assert not any(word.startswith("/") for word in run.command)


def test_results_are_means_beside_the_published_numbers(table, run, tmp_path):
    outcome = run(table(), seeds=(1, 2, 4))
    cell = result(tmp_path)["cells"]["dense birds_10"]
    assert cell["metrics"]["accuracy"] == {
        "mean": pytest.approx(statistics.fmean([61, 62, 64])),
        "std": pytest.approx(statistics.stdev([61, 62, 64])),
        "paper": "94.30 ± 0.20",
    }
    assert list(cell["seeds"]) == ["1", "2", "4"]
    assert cell["parameters"] == {"total": 77, "ratio": 0.25}
    assert {seed["commit"] for seed in cell["seeds"].values()} == {result(tmp_path)["commit"]} == {revision()["commit"]}
    assert outcome["results"] == {"table9": result(tmp_path)}
    lines = (tmp_path / "out" / "table9.md").read_text().splitlines()
    assert "| Dense | birds_10 | 62.33 ± 1.53 | 94.30 ± 0.20 | 3 | 77 | 0.25 | 2.5 |" in lines
    assert not any(line.startswith("Scale") for line in lines)


def test_results_hold_no_path_of_this_machine(table, run, tmp_path):
    run(table())
    for file in ("table9.json", "table9.md"):
        words = re.split(r"[\s\"'`=]", (tmp_path / "out" / file).read_text())
        assert not [word for word in words if word.startswith("/")]


def test_what_is_done_is_not_run_again(table, run, tmp_path):
    folder = table()
    run(folder)
    logs = {log: log.read_text() for log in tmp_path.glob("runs/**/*.log")}
    assert len(logs) == 2
    outcome = run(folder, seeds=(2, 1))
    assert set(outcome["states"].values()) == {"done"}
    assert {log: log.read_text() for log in tmp_path.glob("runs/**/*.log")} == logs


def test_what_was_broken_off_goes_on(table, run, tmp_path):
    folder = table({"one": row(settings={"mood": "breaks off"})})
    assert list(run(folder, seeds=(1,))["failed"]) == ["table9/one birds_10 seed 1"]
    outcome = run(folder, seeds=(1,))
    assert outcome["states"] == {"table9/one birds_10 seed 1": "half done"}
    assert outcome["failed"] == {}
    assert json.loads((tmp_path / "runs/table9/one/birds_10/seed1/metrics.json").read_text())["resumed"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_does_not_stop_the_rest(table, run, tmp_path, jobs):
    folder = table({"a": row(settings={"mood": "bad"}), "b": row(settings={"mood": "silent"}), "c": row()})
    outcome = run(folder, "--jobs", jobs)
    assert {name.split()[0] for name in outcome["failed"]} == {"table9/a", "table9/b"}
    assert outcome["failed"]["table9/a birds_10 seed 2"] == "table9/a birds_10 seed 2 failed:\none\ntwo\nout of luck"
    assert "accuracy was not measured, for 'eval_accuracy' is missing" in outcome["failed"]["table9/b birds_10 seed 1"]
    assert list(result(tmp_path)["cells"]) == ["c birds_10"]


def test_rows_without_data_are_left_out(table, run, tmp_path):
    outcome = run(table({"one": row(paper={"birds_10": 1, "fish": 2})}), seeds=(1,))
    assert outcome["states"] == {
        "table9/one birds_10 seed 1": "to do",
        "table9/one fish seed 1": "data missing",
    }
    assert list(result(tmp_path)["cells"]) == ["one birds_10"]


def test_a_list_runs_nothing(table, run, tmp_path, capsys):
    run(table(), "--list", seeds=(1,))
    assert capsys.readouterr().out.split("\n")[0].split() == ["to", "do", "table9/dense", "birds_10", "seed", "1"]
    assert not (tmp_path / "runs").exists()


def test_a_list_ends_with_totals(table, run, capsys):
    folder = table({"dense": ROWS["dense"], "other": row()})
    run(folder / "dense.yaml", seeds=(1, 2))
    run(folder, "--list", seeds=(1, 2, 3))
    assert capsys.readouterr().out.endswith("\n6 in all: 2 done, 4 to do\n")


def test_the_small_scale_stands_apart_and_says_what_it_changed(table, run, tmp_path):
    folder = table({"dense": ROWS["dense"] | {"small": {"width": 5, "milestones": None}}})
    run(folder, scale="small", seeds=(1,))
    assert not (tmp_path / "out" / "table9.json").exists()
    text = (tmp_path / "out" / "table9-small.md").read_text()
    changes = "`epochs` 3 instead of 200; `milestones` left out instead of [0.5, 0.75]; `width` 5"
    assert f"Scale `small`. Changed from the rows' settings: {changes}." in text
    run(folder, seeds=(1,))
    assert result(tmp_path)["cells"]["dense birds_10"]["settings"]["epochs"] == 200
    assert result(tmp_path, "table9-small")["cells"]["dense birds_10"]["settings"]["epochs"] == 3


def test_extra_flags_win_and_are_told(table, run, tmp_path):
    run(table(), seeds=(1,), extra=["--epochs", 9, "--milestones=0.5", "--nesterov"])
    settings = {"eval_split": "test", "epochs": 9, "milestones": 0.5, "model": "m", "nesterov": True}
    assert result(tmp_path)["cells"]["dense birds_10"]["settings"] == settings
    text = (tmp_path / "out" / "table9.md").read_text()
    assert "`epochs` 9 instead of 200; `milestones` 0.5 instead of [0.5, 0.75]; `nesterov` True." in text
    assert "--extra --epochs 9 --milestones=0.5 --nesterov" in text


def test_runs_of_other_flags_are_not_taken_for_done(table, run, tmp_path):
    run(table())
    outcome = run(table(settings={"epochs": 100}), seeds=(1,))
    assert "seed 1 was trained with other flags" in outcome["failed"]["table9/dense birds_10 seed 1"]
    (tmp_path / "runs/table9/dense/birds_10/seed1/metrics.json").unlink()
    (tmp_path / "runs/table9/dense/birds_10/seed1/checkpoint-1").rmdir()
    assert run(table(settings={"epochs": 100}), seeds=(1,))["failed"] == {}
    assert list(result(tmp_path)["cells"]["dense birds_10"]["seeds"]) == ["1"]  # seed 2 had other settings


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        pytest.param(["--jobs", "0"], ValueError, "--jobs must be at least 1, got 0", id="jobs"),
        pytest.param(["--extra", "--depth=3"], ValueError, "--extra: .*stand_in.py has no flag depth", id="extra"),
        pytest.param(["--extra", "3"], ValueError, "--extra takes flags like --width 8, got '3' first", id="value"),
        pytest.param(["--data", "cats"], ValueError, "--data: no data set 'cats'; there are birds, fish", id="data"),
        pytest.param(["--sedes", "1"], SystemExit, "2", id="flag"),
        pytest.param(["--data", "brids"], ValueError, "no data set 'brids'; .*; did you mean birds", id="data-name"),
        pytest.param(["--extra", "--widht", "8"], ValueError, "has no flag widht; did you mean width", id="extra"),
        pytest.param(["--data", "fish=sea"], FileNotFoundError, "no such file or folder: sea; give fish", id="place"),
        pytest.param(["--script", "train.py"], FileNotFoundError, "no such script: train.py", id="script"),
    ],
)
def test_bad_options_are_refused(table, tmp_path, words, error, message):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    with pytest.raises(error, match=message):
        run_experiments.main([str(table()), "--script", str(tmp_path / "stand_in.py"), *words])


def test_a_row_with_an_unknown_flag_is_refused(table, run):
    with pytest.raises(ValueError, match=r"table9/one: .*stand_in.py has no flag depth"):
        run(table({"one": row(small={"depth": 3})}))


def test_a_script_that_leaves_no_metrics_has_failed(tmp_path):
    (tmp_path / "idle.py").touch()
    with pytest.raises(RuntimeError, match=r"idle.py failed; its output is in .*run.log"):
        run_once([str(tmp_path / "idle.py")], tmp_path / "run" / "metrics.json")


def test_effective_rank_is_the_last_mean_over_products(tmp_path):
    steps = [{"a": 9.0}, {"a": 2.0, "b": 5.0}]
    lines = [
        json.dumps({"step": step, "products": {name: {"effective_rank": rank} for name, rank in ranks.items()}})
        for step, ranks in enumerate(steps)
    ]
    (tmp_path / "diagnostics.jsonl").write_text("\n".join(lines) + "\n")
    assert measure(["effective_rank"], tmp_path, {}) == {"effective_rank": 3.5}


def test_columns_stand_as_in_the_table(table, run, tmp_path):
    columns = {name: {"data": "birds"} for name in ("z", "a", "m")}
    run(table({"one": row(paper=dict.fromkeys("amz"))}, columns=columns), seeds=(1,))
    assert list(result(tmp_path)["cells"]) == ["one z", "one a", "one m"]


def published_rows():
    return read_rows(sorted(path for path in PUBLISHED.iterdir() if path.is_dir()))


OPTIONS = {
    "train_vision.py": (train_vision.ModelOptions, ImageOptions, ImageTrainingArguments),
    "train_clm.py": (train_clm.ModelOptions, train_clm.DataOptions, train_clm.LanguageModelArguments),
    "train_translation.py": (
        train_translation.ModelOptions,
        train_translation.DataOptions,
        train_translation.TranslationArguments,
    ),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The trainings of all rows that are trained, by scale, each with its options and training arguments."""
    rows, folder = published_rows(), tmp_path_factory.mktemp("published")
    places = {name: "data" if known.hub is None else None for row in rows for name, known in row.table.datasets.items()}
    parsers = {script: HfArgumentParser(classes) for script, classes in OPTIONS.items()}
    found = {}
    for scale in SCALES:
        runs = Launch(runs=folder, places=places, scale=scale).plan(rows, [1])
        assert all(run.command[0] == f"run_scripts/{run.row.table.script}" for run in runs)
        parsed = [parsers[run.row.table.script].parse_args_into_dataclasses(list(run.command[1:])) for run in runs]
        found[scale] = [(run, options, args) for run, (options, *_, args) in zip(runs, parsed, strict=True)]
    return found


@pytest.mark.parametrize("scale", SCALES)
def test_the_scripts_take_all_published_rows(published, scale):
    for run, options, args in published[scale]:
        assert args.learning_rate == run.settings["learning_rate"], run.name
        for flag in ("model", "rank_scale", "factor_init"):
            given = run.settings.get(flag, getattr(options, flag, None))
            assert getattr(options, flag, None) in (given, [given]), run.name
        steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs
        assert max(args.dense_steps, getattr(args, "dense_epochs", 0)) < steps, run.name


def test_the_second_papers_runs_on_imagenet_have_its_batch_and_a_rate_that_fits(published):
    for run, _, args in published["full"]:
        if run.row.table.name.startswith("k22") and run.row.data(run.column) == "imagenet":
            assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 1024, run.name
            half = 0.5 if "lr_0.5" in run.row.name else 1
            assert args.learning_rate == pytest.approx(0.1 * 1024 / 256 * half), run.name


def test_the_first_papers_translations_have_the_settings_of_its_code(published):
    found = [each for each in published["full"] if each[0].row.table.name.startswith("k21_figure4")]
    assert {run.row.table.name for run, _, _ in found} == {"k21_figure4_decay", "k21_figure4_rank"}
    for run, options, args in found:
        assert (options.normalize_before, options.dropout, args.max_tokens) == (True, 0.2, 4000)
        assert (args.optim, args.optim_args, args.max_grad_norm) == ("sgd", "momentum=0.99,nesterov=True", 0.1)
        assert (args.learning_rate, args.warmup_start, args.warmup_steps, args.max_steps) == (0.25, 1, 4000, 100000)
        assert run.settings["vocab_size"] == 10000
        if "frobenius" in run.row.name:
            assert (args.weight_decay, args.frobenius_mode) == (0, "coupled")
            assert args.product_decay == run.settings["frobenius_coefficient"] == float(run.column.rpartition("_")[2])
        else:
            assert args.frobenius_decay == []
            assert args.weight_decay == (0 if "none" in run.column else float(run.column.rpartition("_")[2]))


def test_a_row_that_is_not_trained_stands_in_the_table(table, run, tmp_path):
    rows = {"dense": ROWS["dense"], "other": row(row="Other", trained=False, paper={"birds_10": 92.5, "fish": None})}
    outcome = run(table(rows), seeds=(1,))
    assert list(outcome["states"]) == ["table9/dense birds_10 seed 1"]
    cell = result(tmp_path)["cells"]["other birds_10"]
    assert cell["metrics"]["accuracy"] == {"mean": None, "std": None, "paper": 92.5}
    assert "| Other | birds_10 |  | 92.5 |  |  |  |  |" in (tmp_path / "out" / "table9.md").read_text().splitlines()


def test_a_table_names_its_script_and_a_column_its_small_settings(table, tmp_path):
    columns = {"birds_10": {"data": "birds", "width": 64, "small": {"width": 5}}, "fish": {"data": "fish"}}
    rows = {"one": row(paper={"birds_10": None, "fish": None})}
    (only,) = read_rows([table(rows, columns=columns, small={"epochs": 3, "width": 9}, script="train_clm.py")])
    assert only.table.script == "train_clm.py"
    assert [only.flags("birds_10", scale)["width"] for scale in SCALES] == [64, 5]
    assert only.flags("fish", "small")["width"] == 9
    with pytest.raises(ValueError, match=r"table9/one: run_scripts/train_clm.py has no flag epochs"):
        Launch(runs=tmp_path, places={}).plan([only], [1])


def test_a_table_whose_script_is_not_there_is_refused(table, tmp_path):
    rows = read_rows([table(script="train_birds.py")])
    with pytest.raises(FileNotFoundError, match=r"no such script: .*train_birds\.py"):
        Launch(runs=tmp_path, places={}).plan(rows, [1])


def test_data_may_be_taken_by_several_flags(table, tmp_path):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    datasets = {"birds": {"place": ["dataset", "model"]}}
    rows = read_rows([table(datasets=datasets, columns={"birds_10": {"data": "birds"}})])
    (run,) = Launch(script=tmp_path / "stand_in.py", runs=tmp_path, places={"birds": "../b"}).plan(rows, [1])
    command = " ".join(run.command)
    assert "--dataset ../b" in command
    assert "--model ../b" in command
    with pytest.raises(ValueError, match="--data birds: it is not on the Hub; give birds=FOLDER"):
        data_places(["birds"], rows)


def test_metrics_of_language_models_and_translations(tmp_path):
    metrics = {"eval_perplexity_per_token": 9.5, "eval_perplexity_per_word": 30, "seconds": 7200}
    metrics["test"] = {"tokenized_bleu": 31.5, "bleu": 30}
    names = ["perplexity", "word_perplexity", "hours", "bleu"]
    assert measure(names, tmp_path, metrics) == dict(zip(names, [9.5, 30, 2, 31.5], strict=True))
    with pytest.raises(ValueError, match="bleu was not measured, for 'test' is missing"):
        measure(["bleu"], tmp_path, {})


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("k22_table1", 2),
        ("k22_table1_transformer", 2),
        ("k22_table2", 10),
        ("k22_table3", 7),
        ("k22_table4", 4),
        ("k22_table5", 8),
        ("k22_table6", 8),
        ("k22_table7", 4),
        ("k22_table8", 12),
        ("k22_table9", 9),
    ],
)
def test_all_rows_of_the_second_paper_are_there_with_their_numbers(table, rows):
    found = [row for row in published_rows() if row.table.name == table]
    assert len(found) == rows
    ours = {"word_perplexity", "perplexity"} if table == "k22_table1_transformer" else {"word_perplexity"}
    published = [row.published(column) for row in found for column in row.paper]
    assert None not in [value for values in published for name, value in values.items() if name not in ours]


@pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' texts are not here")
@pytest.mark.parametrize(("prefix", "paper"), [("k21", "khodak2021_*.txt"), ("k22", "kamalakara2022_low_rank*.txt")])
def test_every_published_number_stands_in_its_paper(prefix, paper):
    text = " ".join(path.read_text(encoding="utf-8") for path in PAPERS.glob(paper))
    numbers = {float(number) for number in re.findall(r"\d+\.\d+", text)}
    rows = [row for row in published_rows() if row.table.name.startswith(prefix)]
    values = [value for row in rows for column in row.paper for value in row.published(column).values()]
    claimed = {float(number) for value in values if value is not None for number in str(value).split(" ± ")}
    assert claimed - numbers == set()
