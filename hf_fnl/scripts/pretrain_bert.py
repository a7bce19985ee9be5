"""Pretrain a factorized BERT from raw documents: masked language modelling, with next-sentence prediction or without.

hf-fnl train bert --dataset embedded --output_dir runs/bert --ffn_rank 64 --max_steps 1000
hf-fnl train bert config.yaml
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

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
from hf_fnl.tasks.arguments import TextTrainingArguments
from hf_fnl.tasks.documents import DocumentOptions
from hf_fnl.tasks.metrics.tokens import masked_metrics, masked_sums
from hf_fnl.tasks.pretraining import build_pretraining_dataset
from hf_fnl.tasks.pretraining_examples import PretrainingOptions
from hf_fnl.tasks.pretraining_phases import PHASES_HELP, Phase, describe_phase, plan_phases
from hf_fnl.tasks.tokenization import load_tokenizer, train_wordpiece
from hf_fnl.training import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.training.command_line import UsageError, named, parse_arguments
from hf_fnl.training.engines import free_engine
from hf_fnl.training.runs import (
    FACTOR_INIT_HELP,
    announce,
    check_output_folder,
    checkpoint_to_resume,
    finish_run,
    init_methods,
    show_run,
)


@dataclass
class ModelOptions:
    """The model to train; ranks that are not given leave the matrices dense."""

    init_from: str | None = field(default=None, metadata={"help": "Go on from this model; sizes and ranks are its."})
    hidden_size: int = field(default=768, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=12, metadata={"help": "Heads of each layer."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Default: four times hidden_size."})
    max_position_embeddings: int = field(default=512, metadata={"help": "Longest sequence of the model."})
    dropout: float = field(default=0.1, metadata={"help": "Rate of dropout, of hidden states and attention weights."})
    qk_rank: int | None = field(default=None, metadata={"help": "Rank of each head's query-key product."})
    ov_rank: int | None = field(default=None, metadata={"help": "Rank of each head's output-value product."})
    ffn_rank: int | None = field(default=None, metadata={"help": "Rank of the feed-forward matrices."})
    embedding_rank: int | None = field(default=None, metadata={"help": "Rank of the word embedding."})
    factor_init: list[str] = field(default_factory=lambda: ["spectral"], metadata={"help": FACTOR_INIT_HELP})
    stock: bool = field(default=False, metadata={"help": "Train Transformers' own BERT class; takes no ranks."})


@dataclass
class DataOptions(DocumentOptions):
    """The documents and what becomes of them."""

    vocab_size: int = field(default=30522, metadata={"help": "Size of a tokenizer that is trained."})
    lowercase: bool = field(default=True, metadata={"help": "Whether a tokenizer that is trained lower-cases."})
    phases: list[str] = field(default_factory=lambda: ["128"], metadata={"help": PHASES_HELP})
    next_sentence: bool = field(default=True, metadata={"help": "False: masked language modelling only (RoBERTa)."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of tokens to predict."})


def build_model(options: ModelOptions, next_sentence: bool, tokenizer: Any) -> PreTrainedModel:
    """A fresh model of the sizes and ranks asked for, or the one to go on from."""
    if options.stock:
        model_class = BertForPreTraining if next_sentence else BertForMaskedLM
    else:
        model_class = FactorizedBertForPreTraining if next_sentence else FactorizedBertForMaskedLM
    if options.init_from:
        return model_class.from_pretrained(options.init_from, use_safetensors=True)
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
    ranks = {name: getattr(options, name) for name in ("qk_rank", "ov_rank", "ffn_rank", "embedding_rank")}
    if not options.stock:
        return model_class(FactorizedBertConfig(**sizes, **ranks, factor_init=init_methods(options.factor_init)))
    if given := [name for name, rank in ranks.items() if rank is not None]:
        raise UsageError(f"stock=True takes no ranks, got {', '.join(given)}")
    return model_class(BertConfig(**sizes))


def check_lengths(phases: list[tuple[Phase, FLAMBeTrainingArguments]], longest: int) -> None:
    """Refuse sequences that are longer than the model's."""
    if too_long := [phase.length for phase, _ in phases if phase.length > longest]:
        raise UsageError(f"phases: the model's max_position_embeddings is {longest}, got a length of {too_long[0]}")


def train_phase(
    phase: Phase, model: PreTrainedModel, tokenizer: Any, data: DataOptions, args: FLAMBeTrainingArguments, folder: str
) -> tuple[dict[str, Any], FLAMBeTrainer]:
    """Train on sequences of one length, with an optimizer and checkpoints of its own; go on if it was broken off."""
    if args.process_index == 0:
        print(f"\n{describe_phase(args, phase)}", flush=True)
    options = PretrainingOptions(
        max_seq_length=phase.length,
        next_sentence=data.next_sentence,
        mlm_probability=data.mlm_probability,
        seed=args.seed,
    )
    documents = data.training(streaming=data.streaming)
    validation, held_out = None, data.validation()
    if held_out is not None:
        validation = build_pretraining_dataset(held_out, tokenizer, options, num_proc=data.num_proc)
    trainer = FLAMBeTrainer(
        model,
        args,
        train_dataset=build_pretraining_dataset(documents, tokenizer, options, num_proc=data.num_proc),
        eval_dataset=validation,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=masked_metrics,
        preprocess_logits_for_metrics=masked_sums,
    )
    announce(trainer)
    metrics = trainer.train(resume_from_checkpoint=checkpoint_to_resume(args)).metrics
    if validation is not None:
        metrics |= trainer.evaluate()
    trainer.save_state()
    trainer.save_model(folder)  # by all processes: each may hold a part of it
    return metrics, trainer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    options, data, args = parse_arguments(argv, ModelOptions, DataOptions, TextTrainingArguments, description=__doc__)
    phases = plan_phases(data.phases, args)
    if len(phases) > 1 and str(args.resume_from_checkpoint or "true").lower() != "true":
        raise UsageError(
            f"resume_from_checkpoint={args.resume_from_checkpoint} belongs to one phase of {len(phases)}; with true, "
            "each goes on from its own newest checkpoint"
        )
    check_output_folder(args)
    if not options.init_from:
        check_lengths(phases, options.max_position_embeddings)
    set_seed(args.seed)
    if data.tokenizer or options.init_from:
        with named("tokenizer" if data.tokenizer else "init_from", data.tokenizer or options.init_from):
            tokenizer = load_tokenizer(data.tokenizer or options.init_from)
    else:
        documents = data.training()
        with args.main_process_first(desc="training the tokenizer"):
            tokenizer = train_wordpiece(documents["text"], vocab_size=data.vocab_size, lowercase=data.lowercase)
    model = build_model(options, data.next_sentence, tokenizer)
    check_lengths(phases, model.config.max_position_embeddings)
    metrics: dict[str, Any] = {"parameters": parameter_count(model)}
    saved = dataclasses.replace(options, init_from=args.output_dir)
    for number, (phase, own) in enumerate(phases, start=1):
        metrics[f"phase-{number}"], trainer = train_phase(phase, model, tokenizer, data, own, args.output_dir)
        if number < len(phases) and free_engine(trainer):
            del model, trainer  # what an engine took over cannot be trained by the next one
            model = build_model(saved, data.next_sentence, tokenizer)
    if args.should_save:
        tokenizer.save_pretrained(args.output_dir)
        finish_run(args.output_dir, metrics, options, data, args)
    show_run(
        args,
        metrics,
        "hf-fnl train squad --model {folder} --output_dir runs/squad",
        "hf-fnl report {folder} --out {folder}.html",
    )
    return metrics
