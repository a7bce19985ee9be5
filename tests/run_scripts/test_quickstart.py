"""The quickstart, from text to a merged model that answers questions, in a few steps."""

import json

import quickstart


def test_it_goes_from_text_to_a_merged_model_and_reports_what_came_out(tmp_path):
    folder = tmp_path / "run"
    figures = quickstart.main(["--output_dir", str(folder), "--steps", "2", "--long_steps", "2", "--epochs", "0.1"])
    assert json.loads((folder / "summary.json").read_text()) == figures
    assert figures["same answers after merging"] == 1
    assert figures["parameters, factorized"] < figures["parameters, merged"]
    assert figures["loss of masked word pieces, nats"] > figures["entropy of word pieces, nats"]  # nothing is learned
    assert {"pretrained.html", "squad.html"} <= {path.name for path in folder.iterdir()}
