"""The scripts as a user runs them, in small: pretrain, fine-tune, evaluate; settings, resuming, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from after_cases import check_next_steps, check_settings
from launching import SCRIPTS, accelerate_launch, launches
from transformers import AutoModelForPreTraining, AutoModelForQuestionAnswering, AutoTokenizer

from hf_fnl import FactorizedBertForPreTraining, FactorizedBertForQuestionAnswering
from hf_fnl.scripts import evaluate_squad, finetune_squad, pretrain_bert
from hf_fnl.tasks.arguments import SquadTrainingArguments, TextTrainingArguments
from hf_fnl.tasks.embedded import embedded_squad
from hf_fnl.tasks.squad import SquadOptions
from hf_fnl.training.command_line import UsageError
from hf_fnl.training.run_lock import LOCK_FILE

TINY_MODEL = """
    --vocab_size 300 --max_documents 12 --hidden_size 24 --num_hidden_layers 2 --num_attention_heads 3
    --intermediate_size 40 --max_position_embeddings 64 --qk_rank 5 --ov_rank 6 --ffn_rank 7 --embedding_rank 11
"""
QUIET = "--use_cpu --report_to none --disable_tqdm true --logging_steps 1 --save_strategy no"
SQUAD = "--max_seq_length 64 --doc_stride 16"


def pretrain(folder, *more: str) -> dict:
    run = "--max_seq_length 24 --max_steps 5 --learning_rate 0.01 --per_device_train_batch_size 4"
    return pretrain_bert.main([*f"{TINY_MODEL} {QUIET} {run} --output_dir {folder}".split(), *more])


def finetune(model, folder, *more: str) -> dict:
    data = "--max_train_questions 12 --max_eval_questions 8 --max_query_length 16 --max_steps 2"
    flags = f"--model {model} --output_dir {folder} --per_device_train_batch_size 4 {SQUAD} {data} {QUIET}"
    return finetune_squad.main([*flags.split(), *more])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(folder, "--diagnostics_steps", "1")
    return folder


@pytest.fixture(scope="module")
def squad(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    # Grouping by length is for training; evaluation must answer each question with its own logits all the same.
    return folder, finetune(pretrained, folder, "--train_sampling_strategy", "group_by_length")


def test_pretraining_writes_a_model_its_tokenizer_metrics_and_settings(pretrained):
    model = AutoModelForPreTraining.from_pretrained(pretrained)
    assert isinstance(model, FactorizedBertForPreTraining)
    assert (model.config.qk_rank, model.config.ov_rank, model.config.embedding_rank) == (5, 6, 11)
    assert len(AutoTokenizer.from_pretrained(pretrained)) == model.config.vocab_size
    metrics = json.loads((pretrained / "metrics.json").read_text())
    assert metrics["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert metrics["train_loss"] > 0
    assert (pretrained / "diagnostics.jsonl").read_text().count("\n") == 6


def test_settings_written_beside_a_model_repeat_the_run(pretrained, tmp_path):
    settings = json.loads((pretrained / "run_config.json").read_text())
    assert (settings["max_seq_length"], settings["optim"]) == (24, "flambe")
    settings["output_dir"] = str(tmp_path / "again")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    pretrain_bert.main([str(tmp_path / "config.yaml")])
    first, second = (AutoModelForPreTraining.from_pretrained(path) for path in (pretrained, tmp_path / "again"))
    for (name, weight), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_mlm_alone_on_the_stock_class_with_adamw_while_streaming(tmp_path):
    flags = f"""
        --vocab_size 300 --max_documents 12 --hidden_size 24 --num_hidden_layers 1 --num_attention_heads 3
        --max_position_embeddings 64 --stock true --next_sentence false --streaming true --optim adamw_torch
        --max_seq_length 16 --max_steps 2 --output_dir {tmp_path} {QUIET}
    """
    assert pretrain_bert.main(flags.split())["train_loss"] > 0
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


def test_evaluation_on_held_out_documents(tmp_path):
    documents = ["One sentence here. Another one follows it. And a third one ends it."] * 6
    (tmp_path / "held-out.json").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    held_out = ("--validation_dataset", str(tmp_path / "held-out.json"))
    metrics = pretrain(tmp_path / "run", *held_out)
    assert metrics["eval_mlm_loss"] > 0
    assert 0 <= metrics["eval_mlm_accuracy"] <= 1
    assert 0 <= metrics["eval_next_sentence_accuracy"] <= 1


def test_longer_sequences_go_on_from_the_weights_of_shorter_ones(pretrained, tmp_path):
    flags = f"--init_from {pretrained} --max_documents 12 --max_seq_length 48 --max_steps 1 --learning_rate 0"
    pretrain_bert.main([*flags.split(), *QUIET.split(), "--output_dir", str(tmp_path / "long")])
    first, second = (AutoModelForPreTraining.from_pretrained(path) for path in (pretrained, tmp_path / "long"))
    assert all(torch.equal(weight, second.state_dict()[name]) for name, weight in first.state_dict().items())
    with pytest.raises(ValueError, match=r"max_seq_length must be at most 64, .*ForPreTraining, got 65"):
        pretrain_bert.main([*flags.replace(" 48", " 65").split(), "--output_dir", str(tmp_path / "longer")])


def test_fine_tuning_writes_official_predictions(squad):
    folder, metrics = squad
    assert isinstance(AutoModelForQuestionAnswering.from_pretrained(folder), FactorizedBertForQuestionAnswering)
    predictions = json.loads((folder / "predictions.json").read_text())
    assert len(predictions) == 8
    assert {"exact_match", "f1"} < metrics.keys()


def test_evaluating_the_model_or_its_predictions_gives_what_fine_tuning_gave(squad, tmp_path):
    folder, metrics = squad
    common = ["--dataset", "embedded", "--max_questions", "8"]
    model = [*common, *SQUAD.split(), "--max_query_length", "16", "--model", str(folder), "--output_dir", str(tmp_path)]
    scored = [*common, "--predictions", str(folder / "predictions.json")]
    for found in (evaluate_squad.main(model), evaluate_squad.main(scored)):
        assert (found["exact_match"], found["f1"]) == (metrics["exact_match"], metrics["f1"])
    assert json.loads((tmp_path / "predictions.json").read_text()) == json.loads(
        (folder / "predictions.json").read_text()
    )


@pytest.mark.parametrize("article", [0, -1], ids=["among the first", "behind the first"])
def test_version_2_questions_end_to_end(pretrained, tmp_path, article):
    questions = embedded_squad("train")
    for paragraph in questions["data"][article]["paragraphs"]:
        for question in paragraph["qas"]:
            question |= {"is_impossible": True, "answers": []}
    (tmp_path / "v2.json").write_text(json.dumps(questions))
    metrics = finetune(pretrained, tmp_path / "run", "--train_dataset", str(tmp_path / "v2.json"))
    assert metrics.get("NoAns_total", 0) + metrics["HasAns_total"] == metrics["total"] == 8
    given = f"--dataset {tmp_path}/v2.json --predictions {tmp_path}/run/predictions.json --max_questions 8"
    assert evaluate_squad.main(given.split()).items() <= metrics.items()


def test_what_users_do_with_a_pretrained_and_a_fine_tuned_model(pretrained, squad, tmp_path):
    folder, _ = squad
    check_settings(pretrained, pretrain_bert.ModelOptions, pretrain_bert.DataOptions, TextTrainingArguments)
    check_settings(folder, finetune_squad.DataOptions, SquadOptions, SquadTrainingArguments)
    for number, run in enumerate((pretrained, folder)):
        assert check_next_steps(run, tmp_path / str(number))["model"] == str(run)


def test_a_run_that_is_done_is_not_overwritten(pretrained):
    def times() -> dict[Path, int]:  # taking the lock touches it
        return {path: path.stat().st_mtime_ns for path in pretrained.rglob("*") if path.name != LOCK_FILE}

    before = times()
    with pytest.raises(UsageError, match=f"output_dir {pretrained} holds a run that is done"):
        pretrain(pretrained)
    assert times() == before


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (
            finetune_squad,
            "--max_seq_length 65",
            "max_seq_length must be at most 64, .*BertForQuestionAnswering, got 65",
        ),
        (finetune_squad, "--train_dataset ./no.json", r"--train_dataset \./no\.json: .*No such file"),
        (finetune_squad, "--eval_dataset nosuch", "--eval_dataset nosuch: .*no file or folder nosuch, .* could not be"),
        (finetune_squad, "--model nosuch", "--model nosuch: there is no folder nosuch, and the Hub could not be asked"),
        (finetune_squad, "--max_train_questions 0", "max_train_questions must be at least 1, got 0"),
        (finetune_squad, "--output_dir {file}/run", "output_dir .*: .* is a file"),
        (evaluate_squad, "--max_seq_length 65", "max_seq_length must be at most 64, .*, got 65"),
        (evaluate_squad, "--model ./nosuch", r"--model \./nosuch: there is no folder"),
        (
            evaluate_squad,
            "--dataset nosuchfile",
            "--dataset nosuchfile: there is no file or folder nosuchfile, and the Hub",
        ),
        (evaluate_squad, "--model {pretrained}", "it holds no weights of qa_outputs, so it was not trained for this"),
        (evaluate_squad, "--doc_stride 64", "doc_stride 64 must be below"),
        (evaluate_squad, "--predictions p.json", "give either --model or --predictions"),
        (pretrain_bert, "--init_from nosuch --stock", "--init_from nosuch: there is no folder nosuch"),
        (pretrain_bert, "--tokenizer ./nosuch", r"--tokenizer \./nosuch: there is no folder"),
        (pretrain_bert, "--dataset nosuch", "--dataset nosuch: there is no file or folder nosuch"),
        (
            pretrain_bert,
            "--validation_dataset ./no.txt --vocab_size 300",
            r"--validation_dataset \./no\.txt: no such file",
        ),
    ],
)
def test_what_is_refused_is_named_as_it_was_typed(pretrained, squad, tmp_path, script, flags, message):
    (tmp_path / "file").touch()
    windows = {"--max_seq_length": "64", "--doc_stride": "16", "--max_query_length": "16"}
    given = {"--output_dir": str(tmp_path / "run")} | {
        pretrain_bert: {"--use_cpu": "true", "--max_documents": "3"},
        finetune_squad: {"--use_cpu": "true", "--model": str(pretrained), **windows},
        evaluate_squad: {"--dataset": "embedded", "--model": str(squad[0]), **windows},
    }[script]
    words = flags.format(file=tmp_path / "file", pretrained=pretrained).split()
    rest = [word for name, value in given.items() if name not in words for word in (name, value)]
    with pytest.raises((ValueError, OSError), match=message):
        script.main([*words, *rest])
    assert not (tmp_path / "run").exists()


def test_a_broken_off_run_is_not_overwritten_and_goes_on(tmp_path):
    save = ("--save_strategy", "steps", "--save_steps", "1")
    whole = pretrain(tmp_path / "whole", *save)
    (tmp_path / "whole" / "metrics.json").unlink()
    with pytest.raises(ValueError, match="holds checkpoint-5 of an earlier run: set resume_from_checkpoint=true"):
        pretrain(tmp_path / "whole", *save)
    again = pretrain(tmp_path / "whole", *save, "--resume_from_checkpoint", "true")
    assert again["parameters"] == whole["parameters"]


@launches
def test_two_launched_processes_have_the_losses_of_one(tmp_path):
    flags = f"{TINY_MODEL} {QUIET} --max_seq_length 16 --max_steps 4 --learning_rate 0.01 --dropout 0".split()
    config = ["--config_file", str(SCRIPTS / "launch" / "two_cpu_processes.yaml"), str(SCRIPTS / "pretrain_bert.py")]
    accelerate_launch(*config, *flags, "--per_device_train_batch_size", "4", "--output_dir", str(tmp_path))
    pretrain_bert.main([*flags, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "one")])

    def losses(folder: Path) -> list[float]:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert len(losses(tmp_path)) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--qk_rank", "9"], r"qk_rank must be in \[1, 8\], got 9"),
        (["--ffn_rank", "0"], r"ffn_rank must be in \[1, 24\], got 0"),
        (["--factor_init", "svd"], "factor_init must be one of spectral, spectral_ones, default, he, got 'svd'"),
        (["--max_seq_length", "128"], "max_seq_length must be at most max_position_embeddings=64, got 128"),
        (["--stock", "true"], "stock=True does not go with qk_rank, ov_rank, ffn_rank, embedding_rank"),
        (["--frobenius_decay", "vo"], "frobenius_decay must be any of linear, embedding, conv, .* got 'vo'"),
        (["--dataset", "./nowhere.txt"], "no such file or folder: nowhere.txt"),
    ],
    ids=["rank too high", "rank too low", "init", "length", "stock", "kind", "data"],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()
