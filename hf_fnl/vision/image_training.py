"""Training of image classifiers: the options and the schedule of the papers, batches prepared on the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_fnl.optim.frobenius_decay import MODES
from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.trainer import FLAMBeTrainer

DECAYS = ("weight", "frobenius", "crs", "none", "normalized")
MILESTONES = (0.5, 0.75)


@dataclass
class ImageTrainingArguments(FLAMBeTrainingArguments):
    """Training arguments whose defaults are those of Khodak et al. 2021, App. C: SGD with momentum, in steps.

    The learning rate is multiplied by ``lr_gamma`` at each milestone, and by ``warmup_factor`` in the first
    ``warmup_epochs``. With another ``lr_scheduler_type`` than ``"constant"`` it is Transformers' schedule instead.

    Raises:
        ValueError: As in :class:`FLAMBeTrainingArguments`, and if an option is out of range or has no effect.
    """

    optim: str = field(default="sgd", metadata={"help": "Any optimizer of Transformers, flambe or lamb."})
    learning_rate: float = field(default=0.1, metadata={"help": "Highest learning rate."})
    optim_args: str | None = field(
        default=None, metadata={"help": "Further arguments of the optimizer. Default for sgd: its momentum."}
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    nesterov: bool = field(default=False, metadata={"help": "Nesterov's momentum."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "constant, which goes down at lr_milestones; or one of Transformers'."}
    )
    lr_milestones: list[float] | None = field(
        default=None, metadata={"help": "Shares of the training after which the rate goes down. Default: 0.5 0.75."}
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Factor of the learning rate at each milestone."})
    warmup_epochs: int = field(default=0, metadata={"help": "First epochs, with a smaller learning rate."})
    warmup_factor: float = field(default=0.1, metadata={"help": "Factor of the learning rate in these epochs."})
    dense_epochs: int = field(default=0, metadata={"help": "Epochs before the model is factorized; 0: none."})
    decay: str | None = field(
        default=None,
        metadata={
            "help": f"Of factorized layers: {', '.join(DECAYS)} (none, but rescaled after every step to the norms of "
            "the run norms_from). Default: what frobenius_decay and factor_decay say."
        },
    )
    norms_from: str | None = field(default=None, metadata={"help": "Folder of a run with record_norms."})
    record_norms: bool = field(default=False, metadata={"help": "Write the norm of every product after every step."})
    frobenius_mode: str | None = field(  # type: ignore[assignment]  # a string from here on
        default=None, metadata={"help": f"One of {', '.join(MODES)}. Default: coupled with sgd, else decoupled."}
    )
    decay_vectors: bool = field(default=True, metadata={"help": "Decay biases and normalizations as matrices are."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Coefficient of decay."})
    num_train_epochs: float = field(default=200.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images of a batch."})
    per_device_eval_batch_size: int = field(default=500, metadata={"help": "Images of a batch in evaluation."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Norm to which gradients are clipped; 0: not."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint: no, steps, epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints that are kept."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps, epoch."})

    def __post_init__(self) -> None:
        self._derived: set[str] = set()
        takes_momentum = self.optim == "sgd" and self.optim_args is None
        if not takes_momentum and (self.momentum, self.nesterov) != (type(self).momentum, type(self).nesterov):
            raise ValueError("momentum and nesterov are those of optim=sgd without optim_args, where they would stand")
        if takes_momentum:
            self._derive(optim_args=f"momentum={self.momentum},nesterov={str(self.nesterov).lower()}")
        if self.frobenius_mode is None:
            self._derive(frobenius_mode="coupled" if self.optim == "sgd" else "decoupled")
        super().__post_init__()
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs must be positive, got {self.num_train_epochs}")
        self._check_schedule()
        if self.decay not in (None, *DECAYS):
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")
        if (self.decay == "normalized") != (self.norms_from is not None):
            raise ValueError(
                "decay=normalized and norms_from, the run whose norms it keeps to, need each other; got "
                f"decay={self.decay} and norms_from={self.norms_from}"
            )
        if self.dense_epochs < 0 or 0 < self.num_train_epochs <= self.dense_epochs:
            raise ValueError(
                f"dense_epochs must be in [0, num_train_epochs={self.num_train_epochs:g}), got {self.dense_epochs}"
            )
        if self.auto_find_batch_size and (self.dense_epochs or self.warmup_epochs):
            raise ValueError(
                "auto_find_batch_size changes how many steps dense_epochs and warmup_epochs are: set "
                "per_device_train_batch_size instead"
            )

    def _check_schedule(self) -> None:
        stepwise = self.lr_scheduler_type == "constant"
        if stepwise and self.warmup_steps:
            raise ValueError(
                f"lr_scheduler_type=constant has no warmup_steps, got {self.warmup_steps}: use warmup_epochs"
            )
        if not stepwise and (self.lr_milestones or self.warmup_epochs):
            option = "lr_milestones" if self.lr_milestones else "warmup_epochs; use warmup_steps"
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type} does not go with {option}")
        if self.lr_milestones is None:
            self._derive(lr_milestones=list(MILESTONES) if stepwise else [])
        for option, needed in {"lr_gamma": "lr_milestones", "warmup_factor": "warmup_epochs"}.items():
            if (given := getattr(self, option)) != getattr(type(self), option) and not getattr(self, needed):
                raise ValueError(f"{option}={given} has no effect without {needed}")
        if any(not 0 < share < 1 for share in self.lr_milestones or ()):
            raise ValueError(f"lr_milestones must be shares between 0 and 1, got {self.lr_milestones}")
        if self.warmup_epochs < 0 or not self.warmup_factor > 0 or not self.lr_gamma > 0:
            raise ValueError(
                "warmup_epochs must not be negative, warmup_factor and lr_gamma must be positive, got "
                f"{self.warmup_epochs}, {self.warmup_factor} and {self.lr_gamma}"
            )

    @property
    def has_dense_phase(self) -> bool:
        """Whether the model is dense at first."""
        return self.dense_steps > 0 or self.dense_epochs > 0

    def set_products(self, kinds: Collection[str], num_images: int) -> None:
        """Set the decay and the dense steps of a model's factorized layers from ``decay`` and ``dense_epochs``.

        Args:
            kinds: Kinds of factorized layers that the model has, or will have after its dense phase.
            num_images: To train on.

        Raises:
            ValueError: If an option needs factorized layers and there are none.
        """
        needing = {
            f"decay={self.decay}": self.decay not in (None, "weight"),
            f"factor_decay={self.factor_decay}": self.factor_decay != "weight",
            "dense_epochs": self.dense_epochs > 0,
            "record_norms": self.record_norms,
            "diagnostics_steps": self.diagnostics_steps > 0,
        }
        if not kinds and (given := [option for option, is_given in needing.items() if is_given]):
            raise ValueError(f"{given[0]} needs factorized layers: give rank_scale, ratio or overcomplete as well")
        if kinds and self.decay is not None:
            factor_decay = {"crs": "crs", "none": "none", "normalized": "none"}.get(self.decay, "weight")
            self._derive(frobenius_decay=sorted(kinds) if self.decay == "frobenius" else [], factor_decay=factor_decay)
        if self.dense_epochs:
            if self.record_norms or self.norms_from:
                raise ValueError(
                    "record_norms and norms_from need products from the first step on: leave dense_epochs out"
                )
            self._derive(dense_steps=self.dense_epochs * steps_per_epoch(self, num_images))

    def _derive(self, **values: Any) -> None:
        """Set what follows from other options."""
        for name, value in values.items():
            setattr(self, name, value)
        self._derived.update(values)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, without what follows from other options, so that these may be changed in a file."""
        return {name: value for name, value in super().to_dict().items() if name not in self._derived}


def steps_per_epoch(args: TrainingArguments, num_images: int) -> int:
    """Return the number of optimizer steps of an epoch."""
    batches = num_images / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(batches / args.gradient_accumulation_steps)


def step_schedule(args: ImageTrainingArguments, num_training_steps: int, num_images: int) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step, with milestones and a warm-up."""
    milestones = [round(share * num_training_steps) for share in args.lr_milestones or ()]
    warmup = args.warmup_epochs * steps_per_epoch(args, num_images)

    def factor(step: int) -> float:
        passed = sum(step >= milestone for milestone in milestones)
        return args.lr_gamma**passed * (args.warmup_factor if step < warmup else 1.0)

    return factor


class ImageTrainer(FLAMBeTrainer):
    """A Trainer for image classifiers, ours and Transformers', whose batches are prepared on their device.

    Args:
        model: Takes ``pixel_values`` and ``labels``.
        args: How.
        transform: Turns a batch of raw images on the device into what the model takes; called with the images and
            ``training=``.
        **kwargs: As in :class:`~hf_fnl.training.FLAMBeTrainer`.
    """

    args: ImageTrainingArguments

    def __init__(
        self, model: nn.Module, args: ImageTrainingArguments, *, transform: Callable[..., Tensor], **kwargs: Any
    ) -> None:
        super().__init__(model, args, **kwargs)
        self.transform = transform

    def schedule(self, num_training_steps: int) -> Callable[[int], float] | None:
        """Return that of the milestones, or ``None`` for a schedule of Transformers."""
        if self.args.lr_scheduler_type != "constant":
            return None
        return step_schedule(self.args, num_training_steps, len(self.train_dataset))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, of the batch that the transform returns."""
        pixel_values = self.transform(inputs["pixel_values"], training=model.training)
        return super().compute_loss(model, {**inputs, "pixel_values": pixel_values}, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Transformers, in all processes with the statistics of normalizations that a checkpoint has."""
        if self.args.world_size > 1:
            for buffer in self.model.buffers():
                broadcast(buffer)
        return super().evaluate(*args, **kwargs)
