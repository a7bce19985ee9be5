"""Model cards say what is known of a model, no more, and in a form that the Hub takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bert_cases import HEADS, LOW, MASKED_LM
from huggingface_hub import ModelCard, ModelCardData
from training_cases import tiny_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from hf_fnl import (
    FactorizationConfig,
    factorize_,
    merge_,
    to_linear_,
    vision_model,
)
from hf_fnl.models.cards import MARK, Record, model_card, stated_in, write_card
from hf_fnl.optim.diagnostics import parameter_count

SQUAD = HEADS["question-answering"]
QA_SETTINGS = {"model": "org/bert", "train_dataset": "rajpurkar/squad", "eval_split": "validation", "optim": "flambe"}
QA_METRICS = {"parameters / total": 9, "train_samples_per_second": 4.0, "exact_match": 80.5, "f1": 88.25}


FACTORIZATION = {
    "base_model": "org/bert",
    "command": "hf-fnl factorize org/bert --ratio 0.5 --out small",
    "parameters_before": 10_000,
    "parameters_after": 5_000,
}
TEXTS = {"source": "/home/me/texts.txt", "column": "text", "samples": 20, "length": 64}
HEALING = {"texts": TEXTS, "tokens": 30_000, "steps": 25, "held_out_before": 1.36, "held_out_after": 0.79}
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3, "vocab_size": 100}


def facts(card: ModelCard) -> dict[str, str]:
    """The rows of all tables with two columns."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split(" | ")] for line in card.text.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("masked-lm", "fill-mask"),
        ("question-answering", "question-answering"),
        ("sequence", "text-classification"),
        ("tokens", "token-classification"),
        ("decoder", "text-generation"),
        ("backbone", None),
        ("pretraining", None),
    ],
)
def test_the_task_is_named_where_the_head_has_one(name, task):
    model = HEADS[name].build(LOW)
    card = model_card(model, name="me/tiny", metadata=ModelCardData(license="mit", language="en", tags=["tiny"]))
    assert card.data.pipeline_tag == model_card(model.merge()).data.pipeline_tag == task
    assert str(ModelCard(str(card))) == str(card)


def test_parameters_before_and_after_and_ranks_of_heads_and_layers_are_given():
    model = MASKED_LM.build({**LOW, "qk_rank": [5, None], "ov_rank": [2, 3]})
    state = torch.get_rng_state()
    card = model_card(model)
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (int(parameter_count(each)["total"]) for each in (MASKED_LM.build_stock(), model))
    assert facts(card)["parameters"] == f"{after:,}"
    assert facts(card)["parameters of the dense model"] == f"{before:,}, of which {after / before:.1%} are left"
    assert "`qk_rank` 5, dense in 1 of 2 layers, `ov_rank` 2 to 3, `ffn_rank` 8" in card.text
    assert "| embedding | 53 x 21 | 1 | 13 | 1,113 | 962 |" in card.text
    assert "| linear | 32 x 21 | 2 | 8 | 1,344 | 848 |" in card.text
    assert f"| all | | | | {before:,} | {after:,} |" in card.text


@pytest.mark.parametrize("kinds", [("ov",), ("linear",), ("ov", "linear")], ids="-".join)
@pytest.mark.parametrize("pairs", [False, True], ids=["factors", "pairs"])
def test_a_model_that_surgery_cut_counts_its_dense_parameters_and_needs_hf_fnl(kinds, pairs):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    before = int(parameter_count(model)["total"])
    factorize_(model, FactorizationConfig(kinds=kinds, rank_scale=0.25))
    if pairs and "linear" in kinds:
        to_linear_(model)
    after = int(parameter_count(model)["total"])
    card = model_card(model)
    assert facts(card)["parameters of the dense model"] == f"{before:,}, of which {after / before:.1%} are left"
    assert ("| heads | 48 x 48 | 4 | 4 | 9,216 | 2,304 |" in card.text) == ("ov" in kinds)
    assert (card.data.library_name, card.data.tags) == ("hf_fnl", ["hf_fnl", "transformers", "low-rank"])
    assert "import hf_fnl" in card.text
    assert "hf_fnl.merge_(model)" in card.text
    merge_(model)
    merged = model_card(model)
    assert (merged.data.library_name, merged.data.tags) == ("transformers", ["hf_fnl"])
    assert "hf_fnl" not in merged.text.partition("## Use")[2]


def cut_llama() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1))
    factorize_(model, FactorizationConfig(kinds=("ov", "linear"), rank_scale=0.5))
    return model


@pytest.mark.parametrize("make", [cut_llama, lambda: MASKED_LM.build(LOW)], ids=["surgery", "family"])
def test_what_a_card_says_of_loading_and_merging_runs(make, tmp_path):
    model, ids = make().eval(), torch.arange(6).view(1, 6)
    model.save_pretrained(tmp_path)
    found: dict[str, Any] = {}
    (code,) = re.findall(r"```python\n(.*?)```", model_card(model, name=str(tmp_path)).text, flags=re.DOTALL)
    exec(code, found)
    plain = found.get("stock", found["model"])
    assert model_card(plain).data.library_name == "transformers"
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_model_that_was_quantized_after_surgery_says_by_what():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1))
    factorize_(model, FactorizationConfig(rank_scale=0.25))
    to_linear_(model)
    model.config.quantization_config["quantization"] = {"quant_method": "torchao"}
    card = model_card(model)
    assert facts(card)["quantized by"] == "torchao"
    assert card.data.tags == ["hf_fnl", "transformers", "low-rank", "torchao"]
    assert "import hf_fnl" in card.text
    assert "merge_" not in card.text


def test_a_vision_model_of_ours_needs_hf_fnl_even_if_it_is_dense():
    card = model_card(vision_model("resnet20", num_labels=10, width=4))
    assert (card.data.library_name, card.data.tags) == ("hf_fnl", ["hf_fnl", "transformers"])
    assert "from hf_fnl import CifarResNetForImageClassification" in card.text


def test_texts_and_distance_of_calibration_and_healing_are_given():
    factorization = {**FACTORIZATION, "calibration": TEXTS, "calibration_tokens": 1280, "healing": HEALING}
    healed = model_card(MASKED_LM.build(LOW), record=Record(factorization=factorization))
    rows = facts(healed)
    assert rows["calibrated with"] == "1,280 tokens of texts.txt"
    assert rows["healed with"] == "30,000 tokens of texts.txt in 25 steps"
    assert rows["distance from the dense model, held out"] == "1.36 to 0.79"
    assert healed.data.tags == ["hf_fnl", "transformers", "low-rank", "healed"]


def test_a_merged_model_is_dense_and_says_where_it_comes_from():
    merged = MASKED_LM.build(LOW).merge()
    plain = model_card(merged)
    assert plain.data.tags == ["hf_fnl"]
    assert "Factorized layers" not in plain.text
    card = model_card(merged, record=Record(factorization=FACTORIZATION))
    assert card.data.base_model == "org/bert"
    assert f"```bash\n{FACTORIZATION['command']}\n```" in card.text
    assert card.data.library_name == "transformers"
    assert facts(card)["made from"] == "org/bert"
    assert "hf_fnl" not in card.text.partition("## Use")[2]


def test_data_base_model_and_results_of_a_run_are_in_its_card():
    card = model_card(SQUAD.build(LOW), name="me/squad", record=Record(QA_METRICS, QA_SETTINGS, steps=1234))
    assert card.data.base_model == "org/bert"
    assert card.data.datasets == ["rajpurkar/squad"]
    assert card.data.tags == ["hf_fnl", "transformers", "low-rank", "flambe"]
    rows = facts(card)
    assert (rows["exact_match"], rows["f1"], rows["optimizer steps"]) == ("80.5", "88.25", "1,234")
    assert not {"parameters / total", "train_samples_per_second"} & rows.keys()


@pytest.mark.parametrize("data", ["data/dev-v1.1.json", "embedded", str(Path(__file__).parent)])
def test_a_file_or_folder_is_no_data_set_of_the_hub(data):
    card = model_card(SQUAD.build(LOW), record=Record(settings={**QA_SETTINGS, "train_dataset": data}))
    assert card.data.datasets is None
    assert facts(card)["trained on"] == Path(data).name


def test_a_licence_is_not_invented():
    unknown = model_card(MASKED_LM.build(LOW))
    assert "license" not in unknown.data.to_dict()
    assert "The licence is unknown" in unknown.text
    stated = model_card(MASKED_LM.build(LOW), metadata=ModelCardData(license="apache-2.0"))
    assert "Licence: apache-2.0." in stated.text


def test_what_is_stated_comes_before_what_is_read_off():
    stated = ModelCardData(base_model="org/other", datasets=["org/texts"], pipeline_tag="feature-extraction")
    record = Record(settings=QA_SETTINGS)
    card = model_card(SQUAD.build(LOW), record=record, command="make model", data="many texts", metadata=stated)
    assert card.data.base_model == facts(card)["made from"] == "org/other"
    assert card.data.datasets == ["org/texts"]
    assert card.data.pipeline_tag == "feature-extraction"
    assert facts(card)["trained on"] == "many texts"
    assert "```bash\nmake model\n```" in card.text


@pytest.mark.parametrize(
    ("existing", "kept"),
    [
        ("# By hand\n", True),
        ("<!-- This model card has been generated automatically -->\n", False),
        ("This model card has been automatically generated.\n", False),
    ],
    ids=["by-hand", "trainer", "push"],
)
def test_only_a_card_that_no_person_wrote_is_replaced(tmp_path, existing, kept):
    path = tmp_path / "README.md"
    path.write_text(existing)
    assert write_card(path, MASKED_LM.build(LOW)) != kept
    assert (path.read_text() == existing) == kept
    assert (MARK in path.read_text()) != kept


def test_our_card_is_written_anew_until_its_mark_is_removed(tmp_path):
    path, model = tmp_path / "README.md", MASKED_LM.build(LOW)
    assert write_card(path, model)
    first = path.read_text()
    assert write_card(path, model, data="more")
    assert path.read_text() != first
    path.write_text("\n".join(line for line in first.splitlines() if not line.startswith("<!--")))
    assert not write_card(path, model)


def write_run(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_record_is_what_lies_in_the_folder(tmp_path):
    assert Record.read(tmp_path) == Record()
    write_run(tmp_path, metrics={"phase-1": {"eval_loss": 2.0}}, run_config={"seed": 1}, factorization=FACTORIZATION)
    for number, steps in ((1, 30), (2, 4)):
        write_run(tmp_path / f"phase-{number}", trainer_state={"global_step": steps, "log_history": []})
    assert Record.read(tmp_path) == Record({"phase-1 / eval_loss": 2.0}, {"seed": 1}, FACTORIZATION, 34)


def test_the_last_phase_is_the_one_of_the_highest_number(tmp_path):
    for number in (9, 10, 2):
        log = [{"eval_loss": float(number)}]
        write_run(tmp_path / f"phase-{number}", trainer_state={"global_step": 1, "log_history": log})
    assert Record.read(tmp_path).metrics == {"eval_loss": 10.0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.json", '{"f1": ', "metrics.json is damaged: Expecting value"),
        ("run_config.json", "[]", "run_config.json is damaged: expected an object, found list"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        model_card(MASKED_LM.build(LOW), record=tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record must be the folder of a run .* none at .*nothing"):
        model_card(MASKED_LM.build(LOW), record=tmp_path / "nothing")


def test_a_trainer_writes_what_it_knows_and_keeps_a_card_by_hand(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card(license="mit", tags="tiny", finetuned_from="org/bert", dataset_tags="org/texts")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["hf_fnl", "transformers", "low-rank", "flambe", "tiny"]
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("mit", "org/bert", ["org/texts"])
    assert (facts(card)["optimizer steps"], facts(card)["learning_rate"]) == ("1", "0.02")
    assert "train_loss" in facts(card)
    (tmp_path / "README.md").write_text("# By hand\n")
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "# By hand\n"


def test_secrets_and_paths_of_a_run_are_not_in_its_card(tmp_path):
    settings = {**QA_SETTINGS, "hub_token": "hf_secret", "output_dir": "/home/me/run", "model": "/home/me/base"}
    card = model_card(SQUAD.build(LOW), record=Record(settings=settings))
    assert not {word for word in ("hf_secret", "/home/me") if word in str(card)}
    assert facts(card)["made from"] == "base"
    assert card.data.base_model is None


HOSTILE = "a|b\n\n---\n# `x` <script>alert(1)</script> [l](http://h) *s* ```"


def test_metrics_and_settings_enter_a_card_as_text():
    settings = {"model": "org/bert", "optim": HOSTILE, "dataset": HOSTILE, "learning_rate": 0.1}
    factorization = {**FACTORIZATION, "base_model": f"./{HOSTILE}", "command": f"hf-fnl x\n```\n{HOSTILE}"}
    record = Record(metrics={HOSTILE: 1.5, "f1": 2.0}, settings=settings, factorization=factorization)
    card = model_card(MASKED_LM.build(LOW), name=f"me/{HOSTILE}", record=record)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    head, _, command = card.text.partition("## Command")
    assert re.findall(r"(?<!\\)[<\[]", re.sub(r"<!--.*?-->|(`+).*?\1", "", head)) == []
    for line in head.splitlines():
        assert not line.startswith("|") or len(re.findall(r"(?<!\\)\|", line)) in (3, 7), line
        assert line.startswith(("|", "#", "<!--", "On ")) or not line
    assert len(re.findall("^```", command, re.MULTILINE)) == 6  # of the command, and of what follows it


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("license: |\n  mit\n  ---\n  # x", {"license": "mit --- # x"}),
        ("tags: mine", {"tags": ["mine"]}),
        ("tags: [1, a, {b: c}]\nlanguage: {de: 1}", {"tags": ["a"]}),
        ("license: 7", {}),
    ],
    ids=["lines", "one tag", "types", "number"],
)
def test_only_texts_are_taken_from_a_card(tmp_path, head, expected):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    assert {
        k: v for k, v in stated_in(tmp_path / "README.md", ("license", "language", "tags")).to_dict().items() if v
    } == expected
