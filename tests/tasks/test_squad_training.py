"""Fine-tuning on SQuAD: BERT's own routine, whatever optimizer pretrained the model."""

from __future__ import annotations

import json

import pytest
import torch

from hf_fnl import FLAMBe
from hf_fnl.scripts import finetune_squad, pretrain_bert
from hf_fnl.tasks.arguments import SquadTrainingArguments
from hf_fnl.training import FLAMBeTrainer

QUIET = "--use_cpu --report_to none --disable_tqdm true --logging_steps 1 --save_strategy no"


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers that trainers make, in their order."""
    made: list[torch.optim.Optimizer] = []
    create = FLAMBeTrainer.create_optimizer

    def watch(trainer, *args, **kwargs):
        made.append(create(trainer, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(FLAMBeTrainer, "create_optimizer", watch)
    return made


def pretrain(folder):
    pretrain_bert.main(
        f"""--vocab_size 300 --max_documents 12 --hidden_size 24 --num_hidden_layers 1 --num_attention_heads 3
        --max_position_embeddings 64 --max_seq_length 16 --max_steps 1 --optim flambe
        --output_dir {folder} {QUIET}""".split()
    )


def fine_tune(model, folder, flags):
    return finetune_squad.main(
        f"""--model {model} --max_train_questions 24 --max_eval_questions 9 --max_seq_length 64
        --doc_stride 16 --max_query_length 16 --output_dir {folder} {QUIET} {flags}""".split()
    )


def test_all_pretrained_models_are_fine_tuned_alike(tmp_path, optimizers):
    pretrain(tmp_path / "bert")
    fine_tune(tmp_path / "bert", tmp_path / "squad", "--max_steps 20")
    assert isinstance(optimizers[0], FLAMBe)
    assert isinstance(optimizers[-1], torch.optim.AdamW)
    history = json.loads((tmp_path / "squad" / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    expected = [3e-5 * step / 2 for step in (0, 1)] + [3e-5 * (20 - step) / 18 for step in range(2, 20)]
    assert rates == pytest.approx(expected)


def test_options_of_evaluations_leave_a_training_its_answers(tmp_path):
    pretrain(tmp_path / "bert")
    fine_tune(tmp_path / "bert", tmp_path / "plain", "--max_steps 2")
    options = "--eval_do_concat_batches false --prediction_loss_only true --remove_unused_columns false"
    fine_tune(tmp_path / "bert", tmp_path / "set", f"--max_steps 2 --per_device_eval_batch_size 3 {options}")
    plain, found = (json.loads((tmp_path / run / "predictions.json").read_text()) for run in ("plain", "set"))
    assert found == plain


def test_the_defaults_are_those_of_bert(tmp_path):
    args = SquadTrainingArguments(str(tmp_path), use_cpu=True)
    assert (args.optim, args.learning_rate, args.num_train_epochs, args.weight_decay) == ("adamw_torch", 3e-5, 2, 0.01)
    assert (args.lr_scheduler_type, args.get_warmup_steps(1000)) == ("linear", 100)
    assert (args.train_batch_size, args.adam_epsilon, args.frobenius_decay) == (12, 1e-6, [])
