"""Healing a cut model by knowledge distillation: it is trained to match the outputs of the dense one."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback

from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.checkpoints import checkpoints
from hf_fnl.training.trainer import FLAMBeTrainer

_HELD_OUT = 10  # every tenth batch
_RATE, _FEW_STEPS = 3e-4, 50


class DistillationTrainer(FLAMBeTrainer):
    r"""Trainer whose loss is how far a model is from another on the same inputs.

    Where both give logits, it is the mean over positions of :math:`KL(p_{teacher} \| p_{model})`, or their squared
    error where they are those of no classes that exclude each other (``problem_type``, or one logit only); else the
    squared error of the last hidden states over the teacher's squared norm. The models have one output for each
    sequence, as classifiers have, for each token that they are given, as language models and encoders have, and
    encoder-decoders for each of ``decoder_input_ids``. Positions that ``attention_mask`` hides, of these
    ``decoder_attention_mask``, count for nothing; labels are not looked at.

    Args:
        model: The model to train.
        args: How.
        teacher: The model to learn from; it is put into evaluation mode and onto the device of the run.
        **kwargs: As in :class:`FLAMBeTrainer`.

    Raises:
        ValueError: If the Frobenius decay is to be a penalty, which is added to a loss of labels only, or there is a
            ``compute_loss_func`` or ``label_smoothing_factor``, which say how labels give a loss.
    """

    def __init__(self, model: nn.Module, args: FLAMBeTrainingArguments, *, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError("a teacher gives the loss: leave compute_loss_func and label_smoothing_factor out")
        if self._penalized:
            raise ValueError("frobenius_mode cannot be penalty where a teacher gives the loss; decoupled can")
        self.teacher = teacher.eval().to(args.device)
        self.model_accepts_loss_kwargs = False
        self.label_names: list[str] = []  # also where batches hold labels
        self.can_return_loss = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the distance from the teacher, of the mean of its batch."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        config = getattr(self.teacher, "config", None)
        has_two_sides = getattr(config, "is_encoder_decoder", False)
        if has_two_sides and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
            raise ValueError("distillation of an encoder-decoder needs decoder_input_ids: labels are not looked at")
        with torch.no_grad():
            target = self.teacher(**inputs)
        outputs = model(**inputs)
        mask = inputs.get("decoder_attention_mask" if has_two_sides else "attention_mask")
        loss = distillation_loss(outputs, target, mask, getattr(config, "problem_type", None))
        return (loss, outputs) if return_outputs else loss


def distillation_loss(
    outputs: Any, target: Any, attention_mask: Tensor | None = None, problem_type: str | None = None
) -> Tensor:
    """Return the distance of a model's outputs from a teacher's, as :class:`DistillationTrainer` says.

    Raises:
        ValueError: If the two have not the same outputs, or not one for each sequence or token of ``attention_mask``.
    """
    if not {"logits", "last_hidden_state"} & set(target):
        raise ValueError(f"a teacher gives logits or last_hidden_state, and this one {', '.join(target)}")
    name = "logits" if "logits" in target else "last_hidden_state"
    of_model, of_teacher = (tuple(each[name].shape) if name in each else None for each in (outputs, target))
    if of_model is None or of_model != of_teacher:
        raise ValueError(
            f"a model learns from one with the same outputs, and {name} of the model are {of_model}, of the teacher "
            f"{of_teacher}"
        )
    found, wanted = (each[name].float() for each in (outputs, target))
    if found.ndim == 4:  # of images, whose classes or channels come second
        found, wanted = found.movedim(1, -1), wanted.movedim(1, -1)
    if name == "last_hidden_state":
        distance = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
    elif found.shape[-1] > 1 and problem_type in (None, "single_label_classification"):
        found, wanted = found.log_softmax(-1), wanted.log_softmax(-1)
        distance = nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    else:
        distance = (found - wanted).square().mean(-1)
    if attention_mask is None or distance.ndim == 1:
        return distance.mean()
    if distance.shape != attention_mask.shape:
        raise ValueError(
            f"distillation needs an output for each token or sequence, and there are {tuple(distance.shape)} for an "
            f"attention_mask {tuple(attention_mask.shape)}"
        )
    return distance[attention_mask.bool()].mean()


def heal_(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    steps: int = 300,
    learning_rate: float | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, float]:
    """Train a cut model, in place, by distillation from the dense one (:class:`DistillationTrainer`).

    A step takes one batch, in random order. Every tenth batch is held out, the first one at least. Weights of half
    precision are trained in float32 and rounded at the end.

    Args:
        model: The cut model.
        dense: The model that it was cut from; it is put into evaluation mode and onto the device of the run.
        batches: Inputs of both, two or more.
        steps: How many steps of AdamW, whose rate rises for a tenth of them and then falls to zero.
        learning_rate: The highest rate; 3e-4 without one, and less in proportion for fewer than 50 steps.
        output_dir: Keeps checkpoints there, and goes on from the newest complete one; nothing is kept without it.
        **options: More of :class:`FLAMBeTrainingArguments`, such as ``frobenius_decay``, ``bf16`` or ``save_steps``.

    Returns:
        The loss on the batches that are held out, as ``held_out_before`` and ``held_out_after``.

    Raises:
        ValueError: If there are fewer than two batches, ``dense`` is the cut model itself, a batch for an
            encoder-decoder has no ``decoder_input_ids``, or as :class:`FLAMBeTrainer`.

    Warns:
        UserWarning: If the model is farther from the dense one than before.
    """
    if model is dense:
        raise ValueError("dense is the cut model itself: keep a copy of the model before it is cut, or load it anew")
    batches = list(batches)
    if len(batches) < 2:
        raise ValueError(f"healing needs two batches or more, one of which is held out; got {len(batches)}")
    held_out = batches[::_HELD_OUT]
    train = [batch for number, batch in enumerate(batches) if number % _HELD_OUT]
    with tempfile.TemporaryDirectory(prefix="hf_fnl-") as temporary, _in_float32(model), _cache_as_it_was(model):
        kept = {} if output_dir is None else {"save_strategy": "steps"}
        args = _arguments(str(output_dir or temporary), steps, learning_rate, **{**kept, **options})
        trainer = DistillationTrainer(
            model,
            args,
            teacher=dense,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=itemgetter(0),  # an example is a batch already
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        resumes = output_dir is not None and checkpoints(Path(output_dir))
        trainer.train(resume_from_checkpoint=True if resumes else None)
        after = trainer.evaluate()["eval_loss"]
    if after > before:
        warnings.warn(
            f"healing brought the model farther from the dense one on what is held out: {before:.4g} to {after:.4g}; "
            "cut it again, and heal it with more steps and data, or a lower learning_rate",
            stacklevel=2,
        )
    return {"held_out_before": before, "held_out_after": after}


def _arguments(output_dir: str, steps: int, learning_rate: float | None, **options: Any) -> FLAMBeTrainingArguments:
    """The arguments of healing: one batch a step, by AdamW with a warmup and a cosine; ``options`` go before them."""
    settings: dict[str, Any] = {
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "warmup_steps": steps // 10,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "save_steps": 100,
        "save_total_limit": 1,
        "logging_steps": max(1, steps // 20),
        "report_to": [],
        "use_cpu": not torch.accelerator.is_available(),  # else the CPU is found not to have bf16
    }
    return FLAMBeTrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        learning_rate=_RATE * min(1, steps / _FEW_STEPS) if learning_rate is None else learning_rate,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        remove_unused_columns=False,
        prediction_loss_only=True,
        **{**settings, **options},
    )


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters in float32, afterwards in their own dtypes; buffers, such as rotary frequencies, stay as they are."""
    before = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def _cache_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Let the configuration say of the cache afterwards what it said before; a Trainer turns it off for good."""
    before = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            model.config.use_cache = before
