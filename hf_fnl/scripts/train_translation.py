"""Train a factorized Marian on sentence pairs, translate a test set by beam search and score it by BLEU.

hf-fnl train translation --output_dir runs/phrases --bf16 --use_cpu
hf-fnl train translation --dataset iwslt14_de_en --moses true --output_dir runs/iwslt --rank_scale 0.5
hf-fnl train translation config.yaml
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_fnl.models import FactorizedMarianConfig, FactorizedMarianMTModel
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.tasks.arguments import FactorOptions, init_methods
from hf_fnl.tasks.beam_search import translate
from hf_fnl.tasks.length_batches import lengths_of
from hf_fnl.tasks.metrics.bleu import bleu_scores
from hf_fnl.tasks.pretrained import longest_sequence
from hf_fnl.tasks.tokenization import train_joint_bpe
from hf_fnl.tasks.translation import encode_pairs, load_pairs
from hf_fnl.tasks.translation_training import TranslationArguments, TranslationTrainer
from hf_fnl.training.command_line import UsageError, check_at_least, named, parse_arguments
from hf_fnl.training.engines import is_sharded
from hf_fnl.training.low_rank_phase import later_ranks
from hf_fnl.training.runs import check_output_folder, checkpoint_to_resume, finish_run
from hf_fnl.utils.files import write_text


@dataclass
class ModelOptions(FactorOptions):
    """The model to train; ranks that are not given leave the matrices dense, unless ``rank_scale`` is given."""

    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    encoder_layers: int = field(default=2, metadata={"help": "Layers of the encoder."})
    decoder_layers: int = field(default=2, metadata={"help": "Layers of the decoder."})
    num_attention_heads: int = field(default=4, metadata={"help": "Heads of each layer."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Default: four times hidden_size."})
    max_position_embeddings: int = field(default=1024, metadata={"help": "Longest sentence of the model, in tokens."})
    activation_function: str = field(default="relu", metadata={"help": "Between the feed-forward matrices."})
    dropout: float = field(default=0.1, metadata={"help": "Rate of dropout of what a layer adds."})
    attention_dropout: float = field(default=0.0, metadata={"help": "Rate of dropout of attention weights."})
    activation_dropout: float = field(default=0.0, metadata={"help": "Rate of dropout inside the feed-forward part."})
    init_std: float | None = field(default=None, metadata={"help": "Of fresh weights. Default: 1 / sqrt(hidden_size)."})
    normalize_before: bool = field(default=False, metadata={"help": "LayerNorm before each part instead of after."})
    rank_scale: float | None = field(
        default=None, metadata={"help": "Every rank that is not given, as a share of the largest one there is."}
    )

    not_stock = ("rank_scale", "normalize_before", *FactorOptions.rank_options)
    config_names: ClassVar[Mapping[str, str]] = {"intermediate_size": "encoder_ffn_dim"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_scale is not None and not 0 < self.rank_scale <= 1:
            raise ValueError(f"rank_scale must be above 0 and at most 1, got {self.rank_scale}")

    def ranks(self, vocab_size: int) -> dict[str, int]:
        """The ranks that are given or follow from ``rank_scale``, by name."""
        largest = {
            "qk_rank": self.hidden_size // self.num_attention_heads,
            "ov_rank": self.hidden_size // self.num_attention_heads,
            "ffn_rank": min(self.hidden_size, self.intermediate_size or 4 * self.hidden_size),
            "embedding_rank": min(self.hidden_size, vocab_size),
        }
        scaled = {name: max(1, round((self.rank_scale or 0) * limit)) for name, limit in largest.items()}
        ranks = {name: rank or (scaled[name] if self.rank_scale else None) for name, rank in self.given_ranks().items()}
        return {name: rank for name, rank in ranks.items() if rank is not None}


@dataclass
class DataOptions:
    """The sentence pairs, their tokenizer, and how the test set is translated."""

    dataset: list[str] = field(
        default_factory=lambda: ["embedded"],
        metadata={"help": "Hub id, folder, embedded, a file of pairs, or two text files: source, target."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    languages: list[str] = field(default_factory=lambda: ["de", "en"], metadata={"help": "Source and target."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "Split to evaluate on, or none."})
    test_split: str = field(default="test", metadata={"help": "Split to translate and score, or none."})
    validation_dataset: list[str] | None = field(
        default=None, metadata={"help": "As dataset. Default: dataset, unless that is files."}
    )
    test_dataset: list[str] | None = field(default=None, metadata={"help": "Likewise."})
    max_train_pairs: int | None = field(default=None, metadata={"help": "Take the first so many."})
    max_validation_pairs: int | None = field(default=None, metadata={"help": "Take the first so many."})
    max_test_pairs: int | None = field(default=None, metadata={"help": "Take the first so many."})
    drop_empty: bool = field(default=False, metadata={"help": "Leave out pairs with an empty side."})
    drop_long: bool = field(default=False, metadata={"help": "Leave out training pairs that no batch can hold."})
    max_length: int | None = field(default=None, metadata={"help": "Cut sentences to so many tokens. Default: no cut."})
    tokenizer: str | None = field(default=None, metadata={"help": "Hub id or folder. Default: train a joint BPE."})
    vocab_size: int = field(default=1000, metadata={"help": "Size of a tokenizer that is trained."})
    moses: bool = field(default=False, metadata={"help": "The text is Moses-tokenized, which bleu is to undo."})
    num_beams: int = field(default=5, metadata={"help": "Width of the beam search."})
    length_penalty: float = field(default=1.0, metadata={"help": "Above 1 favours long translations."})

    def __post_init__(self) -> None:
        if len(self.languages) != 2:
            raise ValueError(f"languages must be two, source and target, got {self.languages}")
        check_at_least(1, self, "max_train_pairs", "max_validation_pairs", "max_test_pairs", "num_beams")

    @property
    def form(self) -> dict[str, Any]:
        """The language of translations and, if they are so tokenized, that of their Moses tokens, for BLEU."""
        return {"lang": self.languages[1], "detokenize_lang": self.languages[1] if self.moses else None}

    def load(self, part: str) -> datasets.Dataset | None:
        """Pairs of the part "train", "validation" or "test", if there is one."""
        split = getattr(self, f"{part}_split")
        source = None if part == "train" else getattr(self, f"{part}_dataset")
        option = "dataset" if source is None else f"{part}_dataset"
        if source is None and (part == "train" or not any(Path(path).is_file() for path in self.dataset)):
            source = self.dataset
        if split == "none" or source is None:
            return None
        with named(option, source):
            return load_pairs(
                source[0] if len(source) == 1 else source,
                languages=(self.languages[0], self.languages[1]),
                split=split,
                name=self.dataset_config,
                drop_empty=self.drop_empty,
                limit=getattr(self, f"max_{part}_pairs"),
            )


def build_model(options: ModelOptions, tokenizer: PreTrainedTokenizerBase, dense_steps: int) -> PreTrainedModel:
    """A fresh Marian of the sizes asked for, dense at first if there are dense steps, or the model to go on from."""
    own = MarianMTModel if options.stock else FactorizedMarianMTModel if dense_steps else AutoModelForSeq2SeqLM
    if (source := options.load_source(own, tokenizer, dense_steps=dense_steps)) is not None:
        return source
    ranks = {} if dense_steps else options.ranks(len(tokenizer))
    ffn_dim = options.intermediate_size or 4 * options.hidden_size
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": options.hidden_size,
        "encoder_layers": options.encoder_layers,
        "decoder_layers": options.decoder_layers,
        "encoder_attention_heads": options.num_attention_heads,
        "decoder_attention_heads": options.num_attention_heads,
        "encoder_ffn_dim": ffn_dim,
        "decoder_ffn_dim": ffn_dim,
        "max_position_embeddings": options.max_position_embeddings,
        "activation_function": options.activation_function,
        "dropout": options.dropout,
        "attention_dropout": options.attention_dropout,
        "activation_dropout": options.activation_dropout,
        "init_std": options.init_std or options.hidden_size**-0.5,
        "scale_embedding": True,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "forced_eos_token_id": tokenizer.eos_token_id,
    }
    if options.stock:
        model = MarianMTModel(MarianConfig(**settings))
    else:
        factors: dict[str, Any] = {
            "factor_init": init_methods(options.factor_init),
            "normalize_before": options.normalize_before,
            **ranks,
        }
        model = FactorizedMarianMTModel(FactorizedMarianConfig(**settings, **factors))
    # Padding starts a decoder and must not come up again.
    model.generation_config.bad_words_ids = [[tokenizer.pad_token_id]]
    return model


def train_tokenizer(options: ModelOptions, data: DataOptions, train: datasets.Dataset) -> PreTrainedTokenizerBase:
    """A tokenizer that was trained on both sides of the training pairs."""
    tokenizer = train_joint_bpe([*train["source"], *train["target"]], vocab_size=data.vocab_size)
    tokenizer.model_max_length = options.max_position_embeddings
    return tokenizer


def encode(
    data: DataOptions,
    args: TranslationArguments,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | float,
    train: datasets.Dataset,
    validation: datasets.Dataset | None,
    test: datasets.Dataset | None,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Encode the pairs to train on and those to evaluate on, the latter by length, for less padding."""
    if data.max_length is not None and data.max_length > positions:
        raise UsageError(f"max_length must be at most {positions}, the positions of the model, got {data.max_length}")
    if test is not None:
        # That a sentence is too long to be translated is to be known now, not when the training is over.
        encode_pairs(test, tokenizer, longest=positions)
    if validation is not None:
        validation = encode_pairs(validation, tokenizer, longest=positions, max_length=data.max_length)
        validation = validation.select(np.argsort(lengths_of(validation).max(axis=1), kind="stable"))
    longest = min(args.max_tokens, positions)
    train = encode_pairs(train, tokenizer, longest=longest, max_length=data.max_length, drop_long=data.drop_long)
    return train, validation


def score(trainer: TranslationTrainer, tokenizer: Any, pairs: datasets.Dataset, data: DataOptions) -> dict[str, Any]:
    """Translate pairs, write what came out, and return its BLEU.

    Every process translates its share; or all translate all of them together if each holds a part of the model only.
    """
    model, in_step = trainer.model, is_sharded(trainer.accelerator)
    sources = list(pairs["source"])
    search = functools.partial(
        translate, model, tokenizer, num_beams=data.num_beams, length_penalty=data.length_penalty
    )
    if in_step:
        found = search(sources)
    else:
        with PartialState().split_between_processes(sources) as share:
            found = gather_object(search(share))
    if PartialState().is_main_process:
        write_text(Path(trainer.args.output_dir) / "translations.txt", "".join(f"{text}\n" for text in found))
    return bleu_scores(found, list(pairs["target"]), **data.form)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    options, data, args = parse_arguments(argv, ModelOptions, DataOptions, TranslationArguments, description=__doc__)
    resume = checkpoint_to_resume(args)
    check_output_folder(args)
    set_seed(args.seed)
    if data.test_split != "none":  # that nothing can be scored is to be known now, not when the training is over
        bleu_scores(["one"], ["one"], **data.form)
    train, validation, test = (data.load(part) for part in ("train", "validation", "test"))
    tokenizer = options.tokenizer(data.tokenizer) or train_tokenizer(options, data, train)
    factorize = later_ranks(args.dense_steps, options.ranks(len(tokenizer)), init_methods(options.factor_init))
    model = build_model(options, tokenizer, args.dense_steps)
    positions = longest_sequence(model, tokenizer)
    encoded, encoded_validation = encode(data, args, tokenizer, positions, train, validation, test)
    trainer = TranslationTrainer(
        model,
        args,
        factorize=factorize,
        train_dataset=encoded,
        eval_dataset=encoded_validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
    )
    metrics = {**trainer.train(resume_from_checkpoint=resume).metrics, "parameters": parameter_count(model)}
    if validation is not None:
        metrics |= trainer.evaluate()
    if test is not None:
        metrics["test"] = score(trainer, tokenizer, test, data)
    return finish_run(trainer, metrics, options, data, args)
