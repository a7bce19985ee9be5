"""Evaluate a model on SQuAD, or score predictions that were written before, by the official rules.

python run_scripts/evaluate_squad.py --model runs/squad --dataset dev-v1.1.json --output_dir runs/eval
python run_scripts/evaluate_squad.py --predictions runs/squad/predictions.json --dataset dev-v1.1.json
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering, Trainer, TrainingArguments

import hf_fnl  # noqa: F401  registers the factorized models
from hf_fnl.processes import leave
from hf_fnl.training.runs import finish_run, parse_arguments
from hf_fnl.training.tasks.squad import SquadCollator, SquadOptions, SquadPredictions, load_squad, score_predictions
from hf_fnl.training.tasks.squad_evaluation import answer_questions
from hf_fnl.training.tasks.tokenization import load_tokenizer


@dataclass
class EvaluationOptions:
    """What to evaluate, on what."""

    dataset: str = field(metadata={"help": "Hub id, official JSON file, or embedded."})
    split: str = field(default="validation", metadata={"help": "Split of the data set."})
    model: str | None = field(default=None, metadata={"help": "Hub id or folder of a question-answering model."})
    predictions: str | None = field(default=None, metadata={"help": "Official JSON of predictions to score."})
    output_dir: str | None = field(default=None, metadata={"help": "Where predictions and metrics are written."})
    max_questions: int | None = field(default=None, metadata={"help": "Take the first so many."})
    batch_size: int = field(default=32, metadata={"help": "Windows in a batch on each device."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows share."})
    max_query_length: int = field(default=64, metadata={"help": "Tokens of a question; the rest is cut off."})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.predictions is None):
            raise ValueError("give either model or predictions to evaluate, and not both")
        if self.model and not self.output_dir:
            raise ValueError("output_dir is needed to write the predictions of a model")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    (options,) = parse_arguments(argv, EvaluationOptions)
    examples = load_squad(options.dataset, split=options.split, limit=options.max_questions)
    if options.predictions:
        answers = json.loads(Path(options.predictions).read_text(encoding="utf-8"))
        metrics = score_predictions(examples, SquadPredictions(answers, {}, {}))
    else:
        squad = SquadOptions(
            max_seq_length=options.max_seq_length,
            doc_stride=options.doc_stride,
            max_query_length=options.max_query_length,
        )
        tokenizer = load_tokenizer(options.model)
        arguments = TrainingArguments(
            output_dir=options.output_dir,
            per_device_eval_batch_size=options.batch_size,
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to=[],
        )
        model = AutoModelForQuestionAnswering.from_pretrained(options.model)
        trainer = Trainer(model, arguments, data_collator=SquadCollator(tokenizer))
        metrics = answer_questions(trainer, examples, tokenizer, squad, folder=options.output_dir)
    print(json.dumps(metrics, indent=2))
    return finish_run(options.output_dir, metrics, options) if options.output_dir else metrics


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main()
    leave()
