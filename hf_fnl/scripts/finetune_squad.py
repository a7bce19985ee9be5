"""Fine-tune a model on SQuAD, v1.1 or v2.0, and evaluate it by the official rules.

hf-fnl train squad --model runs/bert --train_dataset rajpurkar/squad --output_dir runs/squad
hf-fnl train squad config.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, set_seed

from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.tasks.arguments import SquadTrainingArguments
from hf_fnl.tasks.pretrained import check_length, load_pretrained
from hf_fnl.tasks.squad import SquadOptions, build_squad_features, load_squad
from hf_fnl.tasks.squad_evaluation import answer_questions, first_questions
from hf_fnl.tasks.tokenization import load_tokenizer
from hf_fnl.training import FLAMBeTrainer
from hf_fnl.training.command_line import check_at_least, named, parse_arguments
from hf_fnl.training.runs import check_output_folder, checkpoint_to_resume, finish_run


@dataclass
class DataOptions:
    """Model and questions."""

    model: str = field(metadata={"help": "Hub id or folder of a pretrained model, factorized or stock."})
    train_dataset: str = field(default="embedded", metadata={"help": "Hub id, official JSON file, or embedded."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Likewise. Default: train_dataset."})
    train_split: str = field(default="train", metadata={"help": "Split of train_dataset."})
    eval_split: str = field(default="validation", metadata={"help": "Split of eval_dataset."})
    max_train_questions: int | None = field(default=None, metadata={"help": "Take the first so many."})
    max_eval_questions: int | None = field(default=None, metadata={"help": "Take the first so many."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_train_questions", "max_eval_questions", "num_proc")

    def questions(self, part: str) -> tuple[Dataset, bool]:
        """Load the questions to train ("train") or evaluate on ("eval"); also says whether they are of version 2.0."""
        option = f"{part}_dataset" if getattr(self, f"{part}_dataset") else "train_dataset"
        split, limit = getattr(self, f"{part}_split"), getattr(self, f"max_{part}_questions")
        with named(option, source := getattr(self, option)):
            return first_questions(load_squad(source, split=split), limit)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    data, options, args = parse_arguments(argv, DataOptions, SquadOptions, SquadTrainingArguments, description=__doc__)
    resume = checkpoint_to_resume(args)
    check_output_folder(args)
    set_seed(args.seed)
    with named("model", data.model):
        tokenizer = load_tokenizer(data.model)
    model = load_pretrained("model", data.model, AutoModelForQuestionAnswering, is_trained=False)
    check_length("max_seq_length", options.max_seq_length, model, tokenizer)
    (train, _), (examples, version_2) = data.questions("train"), data.questions("eval")
    trainer = FLAMBeTrainer(
        model,
        args,
        train_dataset=build_squad_features(train, tokenizer, options, train=True, num_proc=data.num_proc),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    metrics = {"parameters": parameter_count(model), **trainer.train(resume_from_checkpoint=resume).metrics}
    reading = {"folder": args.output_dir, "num_proc": data.num_proc, "version_2": version_2}
    metrics |= answer_questions(trainer, examples, tokenizer, options, **reading)
    return finish_run(trainer, metrics, data, options, args)
