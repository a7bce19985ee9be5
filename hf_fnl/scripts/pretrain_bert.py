"""Pretrain a factorized BERT from raw documents: masked language modelling, with next-sentence prediction or without.

hf-fnl train bert --dataset embedded --output_dir runs/bert --ffn_rank 64 --max_steps 1000
hf-fnl train bert --dataset embedded --init_from runs/bert --max_seq_length 512 --output_dir runs/bert-512
hf-fnl train bert config.yaml
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    set_seed,
)

from hf_fnl.models import FactorizedBertConfig, FactorizedBertForMaskedLM, FactorizedBertForPreTraining
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.tasks.arguments import FactorOptions, TextTrainingArguments, init_methods
from hf_fnl.tasks.documents import DocumentOptions
from hf_fnl.tasks.metrics.tokens import masked_metrics, masked_sums
from hf_fnl.tasks.pretrained import check_length
from hf_fnl.tasks.pretraining import build_pretraining_dataset
from hf_fnl.tasks.pretraining_examples import PretrainingOptions
from hf_fnl.tasks.tokenization import train_wordpiece
from hf_fnl.training import FLAMBeTrainer
from hf_fnl.training.command_line import UsageError, parse_arguments
from hf_fnl.training.runs import check_output_folder, checkpoint_to_resume, finish_run


@dataclass
class ModelOptions(FactorOptions):
    """The model to train; ranks that are not given leave the matrices dense."""

    hidden_size: int = field(default=768, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=12, metadata={"help": "Heads of each layer."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Default: four times hidden_size."})
    max_position_embeddings: int = field(default=512, metadata={"help": "Longest sequence of the model."})
    dropout: float = field(default=0.1, metadata={"help": "Rate of dropout, of hidden states and attention weights."})

    config_names: ClassVar[Mapping[str, str]] = {"dropout": "hidden_dropout_prob"}


@dataclass
class DataOptions(DocumentOptions):
    """The documents and what becomes of them."""

    vocab_size: int = field(default=30522, metadata={"help": "Size of a tokenizer that is trained."})
    lowercase: bool = field(default=True, metadata={"help": "Whether a tokenizer that is trained lower-cases."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens of a sequence at most."})
    next_sentence: bool = field(default=True, metadata={"help": "False: masked language modelling only (RoBERTa)."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to predict."})


def build_model(options: ModelOptions, next_sentence: bool, tokenizer: Any) -> PreTrainedModel:
    """A fresh model of the sizes and ranks asked for, or the one to go on from."""
    if options.stock:
        model_class = BertForPreTraining if next_sentence else BertForMaskedLM
    else:
        model_class = FactorizedBertForPreTraining if next_sentence else FactorizedBertForMaskedLM
    if (source := options.load_source(model_class, tokenizer)) is not None:
        return source
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": options.hidden_size,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": options.num_attention_heads,
        "intermediate_size": options.intermediate_size or 4 * options.hidden_size,
        "max_position_embeddings": options.max_position_embeddings,
        "hidden_dropout_prob": options.dropout,
        "attention_probs_dropout_prob": options.dropout,
    }
    if options.stock:
        return model_class(BertConfig(**sizes))
    factors = {**options.given_ranks(), "factor_init": init_methods(options.factor_init)}
    return model_class(FactorizedBertConfig(**sizes, **factors))


def train_tokenizer(data: DataOptions, args: TextTrainingArguments) -> Any:
    """A tokenizer that was trained on the documents."""
    documents = data.training()
    with args.main_process_first(desc="training the tokenizer"):
        return train_wordpiece(documents["text"], vocab_size=data.vocab_size, lowercase=data.lowercase)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    options, data, args = parse_arguments(argv, ModelOptions, DataOptions, TextTrainingArguments, description=__doc__)
    resume = checkpoint_to_resume(args)
    check_output_folder(args)
    if not options.init_from and data.max_seq_length > options.max_position_embeddings:
        raise UsageError(
            f"max_seq_length must be at most max_position_embeddings={options.max_position_embeddings}, got "
            f"{data.max_seq_length}"
        )
    set_seed(args.seed)
    tokenizer = options.tokenizer(data.tokenizer) or train_tokenizer(data, args)
    model = build_model(options, data.next_sentence, tokenizer)
    check_length("max_seq_length", data.max_seq_length, model, tokenizer)
    examples = PretrainingOptions(
        max_seq_length=data.max_seq_length,
        next_sentence=data.next_sentence,
        mlm_probability=data.mlm_probability,
        seed=args.seed,
    )
    documents, held_out = data.training(streaming=data.streaming), data.validation()
    build = functools.partial(build_pretraining_dataset, tokenizer=tokenizer, options=examples, num_proc=data.num_proc)
    trainer = FLAMBeTrainer(
        model,
        args,
        train_dataset=build(documents),
        eval_dataset=None if held_out is None else build(held_out),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=masked_metrics,
        preprocess_logits_for_metrics=masked_sums,
    )
    metrics = {"parameters": parameter_count(model), **trainer.train(resume_from_checkpoint=resume).metrics}
    if held_out is not None:
        metrics |= trainer.evaluate()
    return finish_run(trainer, metrics, options, data, args)
