"""Options of the tasks on text: the ranks of a model, workers that prepare data, BERT's routine of fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_fnl.tasks.pretrained import check_vocabulary, load_pretrained
from hf_fnl.tasks.tokenization import load_tokenizer
from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.command_line import UsageError, named
from hf_fnl.utils.hub import check_source

WORKERS = 2  # one makes two to three times as many examples of 128 tokens as a GPU of 2024 trains BERT-base on


@dataclass
class FactorOptions:
    """Where a model comes from, and its ranks; those that are not given leave the matrices dense.

    Raises:
        ValueError: If the stock class is to have what only a factorized one has.
    """

    init_from: str | None = field(
        default=None, metadata={"help": "Go on from this model; sizes and ranks are its, and others are refused."}
    )
    qk_rank: int | None = field(default=None, metadata={"help": "Rank of each head's query-key product."})
    ov_rank: int | None = field(default=None, metadata={"help": "Rank of each head's output-value product."})
    ffn_rank: int | None = field(default=None, metadata={"help": "Rank of the feed-forward matrices."})
    embedding_rank: int | None = field(default=None, metadata={"help": "Rank of the word embedding."})
    factor_init: list[str] = field(
        default_factory=lambda: ["spectral"],
        metadata={
            "help": "spectral, spectral_ones, he or default; or selector=method each, as in linear=spectral "
            "ov:encoder=spectral, and default for the rest."
        },
    )
    stock: bool = field(default=False, metadata={"help": "Train Transformers' own class; takes no ranks."})

    rank_options: ClassVar[tuple[str, ...]] = ("qk_rank", "ov_rank", "ffn_rank", "embedding_rank")
    not_stock: ClassVar[tuple[str, ...]] = rank_options  # options that the stock class does not have
    config_names: ClassVar[Mapping[str, str]] = {}  # fields of a configuration that are named otherwise than here

    def __post_init__(self) -> None:
        if self.stock and (given := [name for name in self.not_stock if getattr(self, name) not in (None, False)]):
            raise ValueError(f"stock=True does not go with {', '.join(given)}")

    def given_ranks(self) -> dict[str, Any]:
        """The ranks by name, ``None`` for what stays dense."""
        return {name: getattr(self, name) for name in self.rank_options}

    def tokenizer(self, source: str | None) -> PreTrainedTokenizerBase | None:
        """The tokenizer that is named, or that of the model to go on from; ``None`` if one is to be trained."""
        if not (found := source or self.init_from):
            return None
        with named("tokenizer" if source else "init_from", found):
            return load_tokenizer(found)

    def source_config(self, auto_class: Any) -> PreTrainedConfig | None:
        """Read the configuration of the model to go on from, which a class must load; ``None`` without one."""
        if (source := self.init_from) is None:
            return None
        with named("init_from", source):
            check_source(source)
            config, own = AutoConfig.from_pretrained(source), getattr(auto_class, "config_class", None)
            if own is not None and not issubclass(own, type(config)):
                raise ValueError(f"it is a {config.model_type}, which {auto_class.__name__} does not load")
        return config

    def load_source(
        self, auto_class: Any, tokenizer: PreTrainedTokenizerBase, *, dense_steps: int = 0
    ) -> PreTrainedModel | None:
        """Load the model to go on from, if there is one; sizes, and without dense steps ranks, that are given are its.

        Raises:
            FileNotFoundError: If there is no such model.
            ValueError: If it is of another family, has another size or rank, or fewer embeddings than there are tokens.
        """
        if (source := self.init_from) is None or (config := self.source_config(auto_class)) is None:
            return None
        self._check_sizes(config, ignored=(*self.rank_options, "factor_init") if dense_steps else ())
        model = load_pretrained("init_from", source, auto_class, is_trained=False)
        check_vocabulary(model, tokenizer)
        return model

    def _check_sizes(self, config: PreTrainedConfig, ignored: Sequence[str]) -> None:
        for option in fields(self):
            default = option.default if option.default_factory is MISSING else option.default_factory()
            given = getattr(self, option.name)
            if option.name in ("init_from", "stock", *ignored) or given == default:
                continue
            value = init_methods(given) if option.name == "factor_init" else given
            found = getattr(config, self.config_names.get(option.name, option.name), None)
            if found != value:
                cut = ", or cut that model first by hf-fnl factorize" if option.name in self.rank_options else ""
                raise UsageError(
                    f"{option.name}={value} is for a fresh model, and the one of init_from={self.init_from} has "
                    f"{found}: leave {option.name} out{cut}"
                )


def init_methods(entries: Sequence[str]) -> str | dict[str, str]:
    """Return what a configuration takes for ``factor_init``: one method, or methods by selector.

    Raises:
        ValueError: If a method stands among others without a selector.
    """
    if len(entries) == 1 and "=" not in entries[0]:
        return entries[0]
    split = [entry.partition("=") for entry in entries]
    if bare := [selector for selector, equals, _ in split if not equals]:
        raise ValueError(f"factor_init takes one method, or selector=method each; got {bare[0]!r} among several")
    return {selector: method for selector, _, method in split}


@dataclass
class TextTrainingArguments(FLAMBeTrainingArguments):
    """:class:`FLAMBeTrainingArguments` under which data is prepared beside the training wherever a GPU would wait.

    Batches of a stored data set are the same for any number of workers. A stream is read in another order by another
    number of them.
    """

    dataloader_num_workers: int = field(
        default=-1,
        metadata={
            "help": "Processes that prepare data beside each training process; 0: it prepares them itself. Default: "
            f"{WORKERS} with a CUDA GPU, as far as there are cores for them, and 0 without."
        },
    )

    def __post_init__(self) -> None:
        if self.dataloader_num_workers < 0:
            self.dataloader_num_workers = default_workers(use_cpu=self.use_cpu)
        super().__post_init__()


def default_workers(*, use_cpu: bool) -> int:
    """Return how many processes prepare data beside a training process."""
    if use_cpu or not torch.cuda.is_available():
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(WORKERS, max(0, cores - 1))


@dataclass
class SquadTrainingArguments(TextTrainingArguments):
    """:class:`TextTrainingArguments` whose defaults are BERT's own routine, whatever optimizer pretrained the model.

    Devlin et al. 2019's ``run_squad.py``: Adam with decoupled decay, 3e-5 in batches of 12, two epochs, a tenth of
    them warm-up, then linear to zero. Khodak et al. 2021 (App. D) fine-tune all their models alike; what LAMB or FLAMBe
    gave is compared by this, not by how either fine-tunes.
    """

    optim: str = field(
        default="adamw_torch", metadata={"help": "flambe, lamb, or any optimizer of Transformers (adamw_torch, ...)."}
    )
    learning_rate: float = field(default=3e-5, metadata={"help": "Highest learning rate."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the questions."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or a share of all if below 1."})
    per_device_train_batch_size: int = field(default=12, metadata={"help": "Windows of a batch on each device."})
