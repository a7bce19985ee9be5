"""The programs that train, translate and evaluate: ``hf-fnl train bert`` and its like, also as ``run_scripts/*.py``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Program:
    """A program with a ``main`` of its own, which is imported when it runs.

    Args:
        module: Its file in this folder.
        summary: What it does, in a line.
        example: Options to try it with.
    """

    module: str
    summary: str
    example: str

    def run(self) -> NoReturn:
        """Run it with the arguments of the process; ends with ``SystemExit``."""
        for name in ("hf_fnl.models", "hf_fnl.vision.models"):  # registers them, and takes seconds
            importlib.import_module(name)
        from hf_fnl.training.command_line import run_script

        run_script(importlib.import_module(f"hf_fnl.scripts.{self.module}").main)


PROGRAMS = {
    "train bert": Program(
        "pretrain_bert",
        "Pretrain a BERT from raw documents.",
        "--dataset embedded --output_dir runs/bert --ffn_rank 64 --max_steps 1000",
    ),
    "train squad": Program(
        "finetune_squad",
        "Fine-tune a model on SQuAD and evaluate it.",
        "--model runs/bert --train_dataset rajpurkar/squad --output_dir runs/squad",
    ),
    "train clm": Program(
        "train_clm",
        "Train a GPT-2 on raw documents.",
        "--dataset embedded --output_dir runs/gpt2 --ov_rank 32 --ffn_rank 192",
    ),
    "train translation": Program(
        "train_translation",
        "Train a Marian on sentence pairs and score its translations.",
        "--output_dir runs/phrases --bf16 --use_cpu",
    ),
    "train vision": Program(
        "train_vision",
        "Train an image classifier.",
        "--output_dir runs/digits --rank_scale 0.3 --decay frobenius --num_train_epochs 15",
    ),
    "translate": Program(
        "translate", "Translate lines of text.", "--model runs/phrases --input sentences.de --output sentences.en"
    ),
    "evaluate-squad": Program(
        "evaluate_squad",
        "Evaluate a model, or predictions, on SQuAD.",
        "--model runs/squad --dataset dev-v1.1.json --output_dir runs/eval",
    ),
    "interpolate": Program(
        "interpolate",
        "Evaluate networks between a dense run and low-rank ones.",
        "--baseline runs/dense --low_rank runs/low-rank",
    ),
}
