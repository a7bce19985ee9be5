"""Train an image classifier, dense, low-rank, tensorized, overcomplete or pruned, and measure its accuracy.

hf-fnl train vision --output_dir runs/digits --rank_scale 0.3 --decay frobenius --num_train_epochs 15
hf-fnl train vision --dataset uoft-cs/cifar10 --ratio 0.1 --decay frobenius --output_dir runs/cifar10
hf-fnl train vision config.yaml
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TrainerCallback, set_seed

from hf_fnl.attention import find_products
from hf_fnl.layers import Factorized
from hf_fnl.math.spectral import DRAWN_METHODS, INIT_METHODS
from hf_fnl.optim.diagnostics import parameter_count
from hf_fnl.surgery import factorize_, merge_
from hf_fnl.surgery.config import CONV_SCHEMES, TENSOR_SCHEMES, FactorizationConfig
from hf_fnl.tasks.metrics.accuracy import image_metrics, image_sums
from hf_fnl.training.command_line import UsageError, check_at_least, named, parse_arguments
from hf_fnl.training.runs import check_output_folder, checkpoint_to_resume, write_run
from hf_fnl.utils.hub import check_source
from hf_fnl.utils.run_files import flatten
from hf_fnl.vision.do_conv import merge_do_conv_, over_parametrize_
from hf_fnl.vision.image_batches import (
    ImageData,
    ImageOptions,
    ImageTensors,
    keep_on_device,
    load_image_sets,
    single_batch,
    write_image_processor,
)
from hf_fnl.vision.image_training import ImageTrainer, ImageTrainingArguments
from hf_fnl.vision.lottery import train_in_rounds
from hf_fnl.vision.models import PRESETS, inner_convolutions, vision_model
from hf_fnl.vision.norms import FollowNorms, RecordNorms
from hf_fnl.vision.pruning import finalize_, prune_, sparsity, weights_to_keep
from hf_fnl.vision.transforms import BatchTransform

# Khodak et al. 2021, Sec. 5; do_conv is Cao et al. 2020
OVERCOMPLETE: dict[str, dict[str, Any]] = {
    "full": {"rank_scale": 1.0},
    "deep": {"rank_scale": 1.0, "deep": True},
    "wide": {"rank_scale": 3.0},
    "do_conv": {},
}
BY_GRADIENTS = ("snip", "grasp")
AT_INITIALIZATION = ("random", *BY_GRADIENTS)
AFTER_TRAINING = ("magnitude", "lottery")


@dataclass
class ModelOptions:
    """The model to train, and how its convolutions, all but the first, are factorized."""

    model: str = field(default="resnet20", metadata={"help": f"One of {', '.join(PRESETS)}."})
    init_from: str | None = field(
        default=None,
        metadata={"help": "Go on from this model, a Hub id or folder; a classifier for other classes is drawn anew."},
    )
    width: int | None = field(default=None, metadata={"help": "Channels of the first convolution. Default: published."})
    rank_scale: float | None = field(
        default=None,
        metadata={
            "help": "Rank of every convolution as a share of out * kernel height (spatial: Khodak et al. 2021) or of "
            "min(in * kernel points, out) (channel: Kamalakara et al. 2022)."
        },
    )
    ratio: float | None = field(
        default=None, metadata={"help": "Share of the parameters of the whole network that is kept."}
    )
    conv_scheme: str = field(
        default="spatial",
        metadata={"help": f"How a kernel is factorized: {', '.join((*CONV_SCHEMES, *TENSOR_SCHEMES))}."},
    )
    factor_init: str | None = field(
        default=None, metadata={"help": f"{', '.join(INIT_METHODS)}. Default: spectral; default where overcomplete."}
    )
    overcomplete: str | None = field(
        default=None, metadata={"help": f"Train overcomplete and merge at the end: {', '.join(OVERCOMPLETE)}."}
    )
    pruning: str | None = field(
        default=None,
        metadata={
            "help": f"Prune to ratio, before training ({', '.join(AT_INITIALIZATION)}) or after it, and train again "
            f"({', '.join(AFTER_TRAINING)})."
        },
    )
    pruning_rounds: int = field(default=1, metadata={"help": "Rounds of pruning and training again."})
    pruning_images: int = field(default=512, metadata={"help": "Training images by which snip and grasp choose."})
    channels_last: bool = field(default=True, metadata={"help": "Hold channels last in memory, which is faster."})

    def __post_init__(self) -> None:
        known = {
            "conv_scheme": (*CONV_SCHEMES, *TENSOR_SCHEMES),
            "factor_init": (None, *INIT_METHODS),
            "overcomplete": (None, *OVERCOMPLETE),
            "pruning": (None, *AT_INITIALIZATION, *AFTER_TRAINING),
        }
        for option, values in known.items():
            if (given := getattr(self, option)) not in values:
                listed = ", ".join(filter(None, values))
                raise ValueError(f"{option} must be one of {listed}, got {given!r}")
        if self.init_from and (self.width is not None or self.model != type(self).model):
            raise ValueError(f"model and width are for a fresh network: leave them out with init_from={self.init_from}")
        check_at_least(1, self, "pruning_rounds", "pruning_images")
        for option, methods in {"pruning_rounds": AFTER_TRAINING, "pruning_images": BY_GRADIENTS}.items():
            if (given := getattr(self, option)) != getattr(type(self), option) and self.pruning not in methods:
                raise ValueError(f"{option}={given} needs pruning={' or '.join(methods)}, got pruning={self.pruning}")
        if not self.rule and (self.conv_scheme != "spatial" or self.factor_init):
            option = "factor_init" if self.factor_init else "conv_scheme"
            raise ValueError(f"{option} says how factors are made: give rank_scale or ratio, and no pruning")
        if not self.pruning:
            self._check_factors()
        elif self.ratio is None or self.rank_scale is not None or self.overcomplete:
            raise ValueError(f"pruning={self.pruning} takes ratio, and neither rank_scale nor overcomplete")

    def _check_factors(self) -> None:
        if self.overcomplete and self.ratio is not None:
            raise ValueError(f"overcomplete={self.overcomplete} has more parameters, not a share: leave ratio out")
        if self.overcomplete == "do_conv" and self.rank_scale is not None:
            raise ValueError("overcomplete=do_conv has no ranks: leave rank_scale out")
        if self.overcomplete and self.factor_init not in (None, *DRAWN_METHODS):
            raise ValueError(
                f"overcomplete factors are drawn: factor_init must be {' or '.join(DRAWN_METHODS)}, got "
                f"{self.factor_init!r}"
            )

    @property
    def rule(self) -> dict[str, Any]:
        """The options that ranks follow from; empty if the convolutions stay dense."""
        given = {"rank_scale": self.rank_scale, "ratio": self.ratio}
        rule: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
        if self.pruning or self.overcomplete == "do_conv":
            return {}
        return {"overcomplete": True, **OVERCOMPLETE[self.overcomplete], **rule} if self.overcomplete else rule

    def factorization(self, model: nn.Module) -> FactorizationConfig | None:
        """Return how the layers of a model are factorized; ``None`` if they stay as they are."""
        if not self.rule:
            return None
        if kinds_of(model):
            raise UsageError(f"{self.init_from} is factorized already: leave rank_scale, ratio and overcomplete out")
        return FactorizationConfig(
            kinds=("conv",),
            include=inner_convolutions(model),
            conv_scheme=self.conv_scheme,
            init=self.factor_init or ("default" if self.overcomplete else "spectral"),
            **self.rule,
        )


def kinds_of(model: nn.Module) -> set[str]:
    """Kinds of the factorized layers of a model."""
    return {layer.kind for layer in model.modules() if isinstance(layer, Factorized)}


@torch.no_grad()
def redraw_classifier_(model: PreTrainedModel) -> None:
    """Draw all but the backbone anew: the outputs of a classifier of other classes, though as many, mean others."""
    fresh = AutoModelForImageClassification.from_config(model.config).state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith(f"{model.base_model_prefix}."):
            value.copy_(fresh[name])


class Session:
    """The data and options of a run, from which its trainers are made."""

    def __init__(self, options: ModelOptions, data: ImageOptions, args: ImageTrainingArguments) -> None:
        self.options, self.args = options, args
        self.train, self.held_out = (self._placed(images) for images in load_image_sets(data, seed=args.seed))
        self.transform = BatchTransform(
            *self.train.statistics(),
            crop_padding=data.crop_padding or 0,
            horizontal_flip=bool(data.horizontal_flip),
            channels_last=options.channels_last,
        ).to(args.device)

    def _placed(self, images: ImageData) -> ImageData:
        """Return images on the GPU, if they fit there beside the training."""
        if isinstance(images, ImageTensors):
            images = keep_on_device(images, self.args.device)
            self.args.dataloader_pin_memory &= not images.pixel_values.is_cuda
        return images

    def build_model(self) -> PreTrainedModel:
        """A fresh model for these images, or the one to go on from."""
        source, names, channels = self.options.init_from, self.train.class_names, self.train.num_channels
        id2label = dict(enumerate(names))
        if source is None:
            return vision_model(
                self.options.model,
                num_labels=len(names),
                image_size=min(self.train.image_size),
                num_channels=channels,
                width=self.options.width,
                id2label=id2label,
            )
        with named("init_from", source):
            check_source(source)
            config = AutoConfig.from_pretrained(source)
            known = [*config.id2label.values()]
            config.id2label, config.label2id = id2label, {name: number for number, name in id2label.items()}
            model = AutoModelForImageClassification.from_pretrained(
                source, config=config, ignore_mismatched_sizes=True, use_safetensors=True
            )
            if known not in (names, [f"LABEL_{number}" for number in id2label]):  # Transformers' for unnamed classes
                redraw_classifier_(model)
        if model.config.num_channels != channels:
            raise ValueError(f"init_from={source} takes images of {model.config.num_channels} channels, got {channels}")
        return model

    def trainer(self, model: nn.Module, phase: int | None = None, **more: Any) -> ImageTrainer:
        """A trainer of the model; one of several phases has a folder of its own."""
        args = copy.copy(self.args)
        if phase is not None:
            args.output_dir = str(Path(args.output_dir) / f"phase-{phase}")
        self.last_trainer = ImageTrainer(
            model,
            args,
            transform=self.transform,
            train_dataset=self.train,
            eval_dataset=self.held_out,
            data_collator=single_batch,
            compute_metrics=image_metrics,
            preprocess_logits_for_metrics=image_sums,
            **more,
        )
        self._check_engine(self.last_trainer)
        return self.last_trainer

    def _check_engine(self, trainer: ImageTrainer) -> None:
        """Refuse what changes a model that an engine holds."""
        given = {option: getattr(self.options, option) for option in ("overcomplete", "pruning")}
        changing = [f"{option}={value}" for option, value in given.items() if value]
        if changing and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            raise UsageError(
                f"{changing[0]} changes weights beside the training, which FSDP2 and DeepSpeed, who hold them, do not "
                "see: train with DDP (run_scripts/launch/ddp.yaml) or in one process"
            )

    def batch(self, count: int) -> dict[str, torch.Tensor]:
        """Training images drawn with the seed of the run, as an evaluation would prepare them, and their labels."""
        rows = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.args.seed))[:count]
        batch = single_batch(self.train.__getitems__(rows.tolist()))
        images = self.transform(batch["pixel_values"].to(self.args.device), training=False)
        return {"pixel_values": images, "labels": batch["labels"].to(self.args.device)}


def train_factorized(session: Session, model: nn.Module, resume: str | None) -> dict[str, Any]:
    """Train a model, dense or with factors, from the start or after a dense phase; merge what is overcomplete."""
    options, args = session.options, session.args
    config = options.factorization(model)
    factorize: Callable[[nn.Module], object] | None = None
    if config is not None and args.dense_epochs:
        if config.init in DRAWN_METHODS:
            raise UsageError(
                f"dense_epochs trains weights that factor_init={config.init} would draw anew: set it to spectral"
            )
        factorize_(copy.deepcopy(model).to("meta"), config)  # raises now, and not after the dense epochs
        factorize = functools.partial(factorize_, config=config)
    elif config is not None:
        factorize_(model, config)
    later = {"tensor" if options.conv_scheme in TENSOR_SCHEMES else "conv"} if factorize else set()
    args.set_products(kinds_of(model) | later, len(session.train))
    plain = parameter_count(model)["total"]
    if options.overcomplete == "do_conv":
        over_parametrize_(model, include=inner_convolutions(model))
    trainer = session.trainer(model, factorize=factorize, callbacks=norm_callbacks(model, args))
    metrics = {**trainer.train(resume_from_checkpoint=resume).metrics, "parameters": parameter_count(model)}
    if options.overcomplete == "do_conv":
        metrics["parameters"] |= {"dense_equivalent": plain, "ratio": metrics["parameters"]["total"] / plain}
    if options.overcomplete:
        merge = merge_do_conv_ if options.overcomplete == "do_conv" else merge_
        metrics["merged"] = merge_overcomplete_(model, merge, session.batch(args.per_device_eval_batch_size))
    metrics |= trainer.evaluate()
    trainer.save_state()
    return metrics


def norm_callbacks(model: nn.Module, args: ImageTrainingArguments) -> list[TrainerCallback]:
    """Return the callbacks that record the norms of the products, or hold them to those of another run."""
    callbacks: list[TrainerCallback] = []
    if args.norms_from:
        callbacks.append(FollowNorms(find_products(model), args.norms_from))
    if args.record_norms:
        callbacks.append(RecordNorms(find_products(model)))
    return callbacks


@torch.no_grad()
def merge_overcomplete_(
    model: nn.Module, merge: Callable[[nn.Module], object], batch: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Multiply overcomplete layers out, in place; returns the parameters left and the change of the logits."""
    model.eval()
    before = model(batch["pixel_values"]).logits
    merge(model)
    change = (model(batch["pixel_values"]).logits - before).abs().max()
    return {"parameters": parameter_count(model)["total"], "largest_change_of_logits": float(change)}


def train_pruned(session: Session, model: nn.Module, resume: str | None) -> dict[str, Any]:
    """Train a model with a part of its weights, chosen before it is trained or after."""
    options = session.options
    assert options.pruning is not None  # both were checked as they were read
    assert options.ratio is not None
    session.args.set_products((), len(session.train))
    keep = weights_to_keep(model, options.ratio)
    if options.pruning in AFTER_TRAINING:
        rewind = options.pruning == "lottery"
        phases = train_in_rounds(model, session.trainer, keep, rounds=options.pruning_rounds, rewind=rewind)
        return {**phases, **phases[f"phase-{options.pruning_rounds + 1}"]}
    batch = None if options.pruning == "random" else session.batch(options.pruning_images)
    prune_(model.to(session.args.device), keep, method=options.pruning, batch=batch)
    trainer = session.trainer(model)
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    metrics |= trainer.evaluate()
    trainer.save_state()
    finalize_(model)
    return {**metrics, "parameters": sparsity(model)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse, build, run; returns the metrics."""
    options, data, args = parse_arguments(argv, ModelOptions, ImageOptions, ImageTrainingArguments, description=__doc__)
    resume = None if options.pruning in AFTER_TRAINING else checkpoint_to_resume(args)
    check_output_folder(args)
    set_seed(args.seed)
    session = Session(options, data, args)
    model = session.build_model()
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    metrics = (train_pruned if options.pruning else train_factorized)(session, model, resume)
    if args.should_save:
        write_image_processor(args.output_dir, session.train)
        write_run(args.output_dir, metrics, options, data, args)
    session.last_trainer.save_model(args.output_dir)  # by all processes, who may each hold a part
    session.last_trainer.log_metrics("run", flatten(metrics))
    return metrics
