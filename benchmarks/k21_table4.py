"""Table 4 of Khodak et al. 2021 in small: LAMB against FLAMBe, full heads against halved ones.

Between the two stands the simple variant of the paper: LAMB with the gradient of the Frobenius penalty of ``ov`` added
to the loss's gradient. Each cell pretrains a BERT of 4 layers, 256 wide, on Wikipedia articles with the schedule of
NVIDIA's recipe, then fine-tunes it on SQuAD v1.1 and evaluates it on the whole dev set, with the same seed, data, steps
and hyperparameters everywhere. The fine-tuning is BERT's own, at a rate for so small a model. A run that was broken off
goes on. Both are in bfloat16 mixed precision.

    python -m benchmarks.k21_table4 --data ../shared/data --runs runs/k21_table4
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks.harness.grids import add_cell, run_once

HEAD_DIM = 64
OPTIMIZERS = {
    "lamb": "--optim lamb",
    "lamb_frobenius": "--optim lamb --frobenius_decay ov --frobenius_mode coupled",
    "flambe": "--optim flambe",
}
CELLS = {f"{optim}-{rank}": (optim, rank) for rank in (HEAD_DIM, HEAD_DIM // 2) for optim in OPTIMIZERS}
RESULT = Path(__file__).parent / "results" / "k21_table4_small.json"


def pretraining_command(optim: str, rank: int, data: Path, run: Path, steps: int) -> list[str]:
    """The command that pretrains one cell."""
    flags = f"""
        --dataset {data}/wikipedia/train.parquet --validation_dataset {data}/wikipedia/validation.parquet
        --max_validation_documents 40 --tokenizer {data}/vocab/bert-base-uncased --phases 128:{steps}::0.2843
        --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 --qk_rank {rank} --ov_rank {rank}
        {OPTIMIZERS[optim]} --learning_rate 1e-2 --weight_decay 0.01 --lr_scheduler_type polynomial --lr_power 0.5
        --per_device_train_batch_size 32 --per_device_eval_batch_size 32
        --logging_steps 50 --save_steps 250 --save_total_limit 1 --diagnostics_steps 100
        --bf16 --use_cpu --seed 42 --report_to none --output_dir {run}/pretrained --resume_from_checkpoint true
    """
    return ["run_scripts/pretrain_bert.py", *flags.split()]


def finetuning_command(data: Path, run: Path) -> list[str]:
    """The command that fine-tunes and evaluates one cell; the same for all."""
    flags = f"""
        --model {run}/pretrained --train_dataset {data}/squad/train-partial-v1.1.json
        --eval_dataset {data}/squad/dev-v1.1.json --max_seq_length 256 --doc_stride 96 --max_query_length 32
        --learning_rate 5e-4 --per_device_train_batch_size 32 --per_device_eval_batch_size 64
        --logging_steps 50 --save_steps 250 --save_total_limit 1 --bf16 --use_cpu --seed 42 --report_to none
        --train_sampling_strategy group_by_length --output_dir {run}/squad --resume_from_checkpoint true
    """
    return ["run_scripts/finetune_squad.py", *flags.split()]


def run_cell(name: str, data: Path, runs: Path, steps: int) -> dict[str, Any]:
    """Pretrain and fine-tune one cell, and collect what the table shows."""
    optim, rank = CELLS[name]
    run = runs / name
    pretrained = run_once(pretraining_command(optim, rank, data, run, steps), run / "pretrained" / "metrics.json")
    squad = run_once(finetuning_command(data, run), run / "squad" / "metrics.json")
    phase = pretrained["phase-1"]
    return {
        "optimizer": optim,
        "head_rank": rank,
        "pretraining_steps": steps,
        "parameters": pretrained["parameters"]["total"],
        "mlm_loss": phase["eval_mlm_loss"],
        "mlm_accuracy": phase["eval_mlm_accuracy"],
        "next_sentence_accuracy": phase["eval_next_sentence_accuracy"],
        "exact_match": squad["exact_match"],
        "f1": squad["f1"],
        "commands": [pretrained["command"], squad["command"]],
        "commits": [pretrained["commit"], squad["commit"]],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the cells asked for and write every cell that is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/k21_table4"), help="where models and logs go")
    parser.add_argument("--steps", type=int, default=1000, help="pretraining steps of every cell")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="cells to run")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in options.cells:
        cell = run_cell(name, options.data, options.runs, options.steps)
        result = add_cell(RESULT, name, cell, f"python -m benchmarks.k21_table4 --steps {options.steps}")
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
