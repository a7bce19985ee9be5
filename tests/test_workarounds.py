"""Each workaround is still needed, and does what it says.

That under FSDP2 tied parameters stay in one unit, and that an evaluation before a training by several processes changes
nothing, is tested in ``test_engines.py``: there training fails, or gives other losses, without it. That DeepSpeed runs
twice in one process is tested there, too.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bert_cases import LOW, MASKED_LM
from low_rank_cases import tiny_gpt2, tiny_texts
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from training_cases import losses, tiny_examples, tiny_model
from transformers import BertForPreTraining, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_fnl import FactorizedBertForMaskedLM, FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.workarounds import full_parameters


@pytest.fixture
def zero3() -> Iterator[Any]:
    pytest.importorskip("deepspeed")
    yield HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    unset_hf_deepspeed_config()


def test_models_are_made_and_loaded_whole_under_zero3(zero3, tmp_path):
    assert is_deepspeed_zero3_enabled()
    with full_parameters():
        assert not is_deepspeed_zero3_enabled()
        model = MASKED_LM.build(LOW)
    assert is_deepspeed_zero3_enabled()
    model.save_pretrained(tmp_path)
    for loaded in (FactorizedBertForMaskedLM.from_pretrained(tmp_path), MASKED_LM.auto_class.from_pretrained(tmp_path)):
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    stock = MASKED_LM.stock(MASKED_LM.family.stock_config(**MASKED_LM.family.sizes))
    assert FactorizedBertForMaskedLM.from_dense(stock, **LOW).config.ov_rank == LOW["ov_rank"]


def test_without_it_layers_are_divided_before_they_are_cut(zero3, monkeypatch, tmp_path):
    """Ends with the release of Transformers in which this fails: then the workaround can go."""
    with full_parameters():
        MASKED_LM.build(LOW).save_pretrained(tmp_path)
    monkeypatch.setattr("hf_fnl.workarounds.deepspeed.unset_hf_deepspeed_config", lambda: None)
    with pytest.raises(Exception):  # noqa: B017 - whatever DeepSpeed raises here
        FactorizedBertForMaskedLM.from_pretrained(tmp_path)


OPTIONS = {
    "max_steps": 4, "save_steps": 2, "learning_rate": 0.02, "per_device_train_batch_size": 8, "logging_steps": 1,
    "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "optim": "adamw_torch",
}  # fmt: skip


@pytest.fixture
def old(tmp_path) -> Path:
    """A checkpoint of a BERT as bert-base-uncased has it: normalizations have ``gamma`` and ``beta``."""
    tiny_model(stock=True).save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    renamed = {}
    for name, weight in load_file(path).items():
        old_name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[old_name] = weight + 0.5 if old_name != name else weight
    save_file(renamed, path, metadata={"format": "pt"})
    return tmp_path / "old"


def resumed(trainer_class: type, args: TrainingArguments, old: Path) -> tuple[Trainer, Trainer]:
    """A training of the old model, and one that goes on from its middle with a model that begins otherwise."""
    first = trainer_class(BertForPreTraining.from_pretrained(old), args, train_dataset=tiny_examples())
    first.train()
    model = BertForPreTraining.from_pretrained(old)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = trainer_class(model, args, train_dataset=tiny_examples())
    again.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    return first, again


@pytest.mark.filterwarnings("ignore")
def test_a_stock_trainer_loses_the_normalizations_of_an_old_checkpoint_and_ours_does_not(old, tmp_path):
    stock = resumed(Trainer, TrainingArguments(str(tmp_path / "stock"), **OPTIONS), old)
    assert losses(stock[0]) != losses(stock[1]), "Transformers is mended: forget_old_names_ can go"
    ours = resumed(FLAMBeTrainer, FLAMBeTrainingArguments(str(tmp_path / "ours"), **OPTIONS), old)
    assert losses(ours[0]) == losses(ours[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_given", [True, False], ids=["model", "model_init"])
def test_a_stock_trainer_counts_labels_of_gpt2_that_nothing_predicts_and_ours_does_not(tmp_path, is_given):
    model, texts = tiny_gpt2(dropout=0.0), tiny_texts(8)
    ids = torch.stack([text["input_ids"] for text in texts])
    expected = model.eval()(input_ids=ids, labels=ids).loss.item()
    data = {"train_dataset": texts, "eval_dataset": texts}
    options = {**OPTIONS, "max_steps": 1}
    stock = Trainer(copy.deepcopy(model), TrainingArguments(str(tmp_path), **options), **data)
    assert stock.evaluate()["eval_loss"] != pytest.approx(expected), "mended: name_causal_loss_ can go"
    data |= {"model": copy.deepcopy(model)} if is_given else {"model_init": lambda: copy.deepcopy(model)}
    ours = FLAMBeTrainer(args=FLAMBeTrainingArguments(str(tmp_path), **options), **data)
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected)
    ours.train()
    assert losses(ours) == [pytest.approx(expected, rel=1e-4)]
