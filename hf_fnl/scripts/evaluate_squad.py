"""Evaluate a model on SQuAD, or score predictions that were written before, by the official rules.

hf-fnl evaluate-squad --model runs/squad --dataset dev-v1.1.json --output_dir runs/eval
hf-fnl evaluate-squad --predictions runs/squad/predictions.json --dataset dev-v1.1.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_fnl.tasks.pretrained import check_length, load_pretrained
from hf_fnl.tasks.squad import SquadOptions, load_squad
from hf_fnl.tasks.squad_evaluation import answer_questions, first_questions, score_predictions
from hf_fnl.tasks.tokenization import load_tokenizer
from hf_fnl.training.command_line import check_at_least, named, parse_arguments
from hf_fnl.training.runs import write_run
from hf_fnl.utils.files import check_writable


@dataclass
class EvaluationOptions:
    """The model or predictions to evaluate, and the questions."""

    dataset: str = field(metadata={"help": "Hub id, official JSON file, or embedded."})
    split: str = field(default="validation", metadata={"help": "Split of the data set."})
    model: str | None = field(default=None, metadata={"help": "Hub id or folder of a question-answering model."})
    predictions: str | None = field(default=None, metadata={"help": "Official JSON of predictions to score."})
    output_dir: str | None = field(default=None, metadata={"help": "Where predictions and metrics are written."})
    max_questions: int | None = field(default=None, metadata={"help": "Take the first so many."})
    batch_size: int = field(default=32, metadata={"help": "Windows in a batch on each device."})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.predictions is None):
            raise ValueError("give either --model or --predictions to evaluate, and not both")
        if self.model and not self.output_dir:
            raise ValueError("--output_dir is needed to write the predictions of a model")
        check_at_least(1, self, "max_questions", "batch_size")

    def questions(self) -> tuple[Dataset, bool]:
        """Load the questions to evaluate on, and find out whether they are of version 2.0."""
        with named("dataset", self.dataset):
            return first_questions(load_squad(self.dataset, split=self.split), self.max_questions)


def read_predictions(path: Path) -> dict[str, str]:
    """The answers in an official JSON file, by the id of the question."""
    with named("predictions", path):
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        answers = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(answers, dict):
            raise ValueError(f"expected an object of answers by question id, found {type(answers).__name__}")
        return answers


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    options, windows = parse_arguments(argv, EvaluationOptions, SquadOptions, description=__doc__)
    if options.output_dir:
        check_writable("output_dir", Path(options.output_dir))
    if options.predictions:
        answers = read_predictions(Path(options.predictions))
        examples, version_2 = options.questions()
        metrics = score_predictions(examples, answers, version_2=version_2)
    else:
        with named("model", options.model):
            tokenizer = load_tokenizer(options.model)
        model = load_pretrained("model", options.model, AutoModelForQuestionAnswering, is_trained=True)
        check_length("max_seq_length", windows.max_seq_length, model, tokenizer)
        examples, version_2 = options.questions()
        arguments = TrainingArguments(
            output_dir=options.output_dir,
            per_device_eval_batch_size=options.batch_size,
            dataloader_pin_memory=torch.accelerator.is_available(),
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
        )
        trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(tokenizer))
        metrics = answer_questions(
            trainer, examples, tokenizer, windows, folder=options.output_dir, version_2=version_2
        )
    print(json.dumps(metrics, indent=2))
    if options.output_dir:
        write_run(options.output_dir, metrics, options, windows)
        print(f"saved in {options.output_dir}", file=sys.stderr)
    return metrics
