"""Train a factorized GPT-2 on raw documents, and measure its perplexity on held-out ones.

hf-fnl train clm --dataset embedded --output_dir runs/gpt2 --ov_rank 32 --ffn_rank 192 --max_steps 1000
hf-fnl train clm config.yaml
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, default_data_collator, set_seed

from hf_fnl.models import FactorizedGPT2Config, FactorizedGPT2LMHeadModel
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.tasks.arguments import FactorOptions, init_methods
from hf_fnl.tasks.clm import BlockDataset, build_blocks
from hf_fnl.tasks.documents import DocumentOptions
from hf_fnl.tasks.metrics.tokens import causal_metrics, causal_sums
from hf_fnl.tasks.tokenization import train_byte_bpe
from hf_fnl.training import FLAMBeTrainer, FLAMBeTrainingArguments
from hf_fnl.training.command_line import UsageError, parse_arguments
from hf_fnl.training.low_rank_phase import later_ranks
from hf_fnl.training.runs import check_output_folder, checkpoint_to_resume, finish_run

logger = logging.getLogger(__name__)


@dataclass
class ModelOptions(FactorOptions):
    """The model to train; ranks that are not given leave the matrices dense."""

    n_embd: int = field(default=768, metadata={"help": "Width of the model."})
    n_layer: int = field(default=12, metadata={"help": "Number of layers."})
    n_head: int = field(default=12, metadata={"help": "Heads of each layer."})
    n_inner: int | None = field(default=None, metadata={"help": "Width between FFN matrices. Default: 4 * n_embd."})
    n_positions: int = field(default=1024, metadata={"help": "Longest sequence of the model."})
    dropout: float = field(default=0.1, metadata={"help": "Rate of dropout, of hidden states and attention weights."})
    rank_scale: float | None = field(
        default=None,
        metadata={
            "help": "qkv_rank and ffn_rank as a share of the smaller side of their matrices; the attention's output "
            "projection stays dense. Kamalakara et al. 2022 take 0.625."
        },
    )
    qkv_rank: int | None = field(default=None, metadata={"help": "Rank of the queries', keys' and values' matrix."})

    rank_options = ("qkv_rank", *FactorOptions.rank_options)
    not_stock = ("rank_scale", *rank_options)
    config_names: ClassVar[Mapping[str, str]] = {"dropout": "resid_pdrop"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_scale is None:
            return
        if not 0 < self.rank_scale <= 1:
            raise ValueError(f"rank_scale must be above 0 and at most 1, got {self.rank_scale}")
        if fixed := [name for name in ("qkv_rank", "ffn_rank") if getattr(self, name) is not None]:
            raise ValueError(f"rank_scale sets qkv_rank and ffn_rank: leave out rank_scale or {', '.join(fixed)}")

    @property
    def model_class(self) -> Any:
        """The class to train."""
        return GPT2LMHeadModel if self.stock else FactorizedGPT2LMHeadModel

    def ranks(self) -> dict[str, Any]:
        """All ranks, with those that ``rank_scale`` stands for."""
        ranks = self.given_ranks()
        if self.rank_scale is not None:
            ranks["qkv_rank"] = max(1, round(self.rank_scale * self.n_embd))
            ranks["ffn_rank"] = max(1, round(self.rank_scale * min(self.n_embd, self.n_inner or 4 * self.n_embd)))
        return ranks


@dataclass
class DataOptions(DocumentOptions):
    """The documents and what becomes of them."""

    validation_split: str = field(default="validation", metadata={"help": "Split of validation_dataset."})
    vocab_size: int = field(default=50257, metadata={"help": "Size of a tokenizer that is trained."})
    block_size: int | None = field(default=None, metadata={"help": "Tokens of an example. Default: n_positions."})
    eval_block_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a block of the evaluation. Default: block_size. Positions beyond those of the training "
            "are untrained."
        },
    )
    eval_stride: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that a block of the evaluation predicts; the others in it are context. Default: "
            "eval_block_size - 1, the fewest blocks."
        },
    )


@dataclass
class LanguageModelArguments(FLAMBeTrainingArguments):
    """Training arguments whose optimizer asks for no products of heads, which ``qkv_rank`` leaves none of."""

    optim: str = field(default="adamw_torch", metadata=FLAMBeTrainingArguments.__dataclass_fields__["optim"].metadata)


def train_tokenizer(data: DataOptions, args: FLAMBeTrainingArguments) -> Any:
    """A tokenizer that was trained on the documents."""
    documents = data.training()
    with args.main_process_first(desc="training the tokenizer"):
        return train_byte_bpe(documents["text"], vocab_size=data.vocab_size)


def build_model(options: ModelOptions, tokenizer: Any, dense_steps: int) -> PreTrainedModel:
    """A fresh model of the sizes asked for, dense at first if there are dense steps, or the one to go on from."""
    if (source := options.load_source(options.model_class, tokenizer, dense_steps=dense_steps)) is not None:
        return source
    ranks = {} if dense_steps else options.ranks()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "n_embd": options.n_embd,
        "n_layer": options.n_layer,
        "n_head": options.n_head,
        "n_inner": options.n_inner,
        "n_positions": options.n_positions,
        "resid_pdrop": options.dropout,
        "embd_pdrop": options.dropout,
        "attn_pdrop": options.dropout,
    }
    if options.stock:
        return GPT2LMHeadModel(GPT2Config(**sizes))
    return FactorizedGPT2LMHeadModel(
        FactorizedGPT2Config(**sizes, **ranks, factor_init=init_methods(options.factor_init))
    )


def block_sizes(data: DataOptions, n_positions: int, *, is_fresh: bool) -> tuple[int, int]:
    """Tokens of a block, in training and in evaluation.

    Raises:
        ValueError: If the model has fewer positions.
    """
    block_size = data.block_size or n_positions
    eval_block_size = data.eval_block_size or block_size
    for name, size in (("block_size", block_size), ("eval_block_size", eval_block_size)):
        if size > n_positions:
            raise UsageError(f"{name}: the model's n_positions is {n_positions}, got {size}")
    if is_fresh and eval_block_size > block_size:
        logger.warning(
            "eval_block_size=%d is above block_size=%d: the positions in between are evaluated as they were drawn",
            eval_block_size,
            block_size,
        )
    return block_size, eval_block_size


def held_out_blocks(data: DataOptions, tokenizer: Any, block_size: int) -> BlockDataset | None:
    """The blocks to evaluate on, if any."""
    documents = data.validation()
    if documents is None:
        return None
    return build_blocks(documents, tokenizer, block_size=block_size, stride=data.eval_stride, num_proc=data.num_proc)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    options, data, args = parse_arguments(argv, ModelOptions, DataOptions, LanguageModelArguments, description=__doc__)
    check_output_folder(args)
    factorize = later_ranks(args.dense_steps, options.ranks(), init_methods(options.factor_init))
    sizes: Any = options.source_config(options.model_class) or options
    block_size, eval_block_size = block_sizes(data, sizes.n_positions, is_fresh=sizes is options)
    set_seed(args.seed)
    tokenizer = options.tokenizer(data.tokenizer) or train_tokenizer(data, args)
    model = build_model(options, tokenizer, args.dense_steps)
    held_out = held_out_blocks(data, tokenizer, eval_block_size)
    documents = data.training(streaming=data.streaming)
    trainer = FLAMBeTrainer(
        model,
        args,
        factorize=factorize,
        train_dataset=build_blocks(documents, tokenizer, block_size=block_size, num_proc=data.num_proc),
        eval_dataset=held_out,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        compute_metrics=functools.partial(causal_metrics, num_words=held_out.num_words) if held_out else None,
        preprocess_logits_for_metrics=causal_sums,
    )
    metrics = trainer.train(resume_from_checkpoint=checkpoint_to_resume(args)).metrics
    metrics |= {"parameters": parameter_count(model)}
    if held_out is not None:
        metrics |= trainer.evaluate()
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.n_positions)
    return finish_run(trainer, metrics, options, data, args)
