"""A Trainer that trains with FLAMBe, LAMB or any other optimizer, and decays products."""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertLMHeadModel, BertPreTrainedModel, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_fnl.decay import FrobeniusDecay, frobenius_penalty
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.products import Product, find_products
from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DiagnosticsCallback
from hf_fnl.training.card import write_trainer_card


def build_optimizer(model: nn.Module, args: FLAMBeTrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that ``args`` describe, over named groups of the trainable parameters of ``model``.

    Raises:
        ValueError: If ``args.frobenius_decay`` names a kind of product that the model does not have.
    """
    products = decayed_products(model, args)
    if args.optim == "flambe":
        groups = parameter_groups(
            model, weight_decay=args.weight_decay, products=products, frobenius_decay=args.product_decay
        )
        return FLAMBe(groups, products=products, **_lamb_arguments(args))
    groups = parameter_groups(model, weight_decay=args.weight_decay, products=products, frobenius_decay=0.0)
    if args.optim == "lamb":
        optimizer: torch.optim.Optimizer = Lamb(groups, **_lamb_arguments(args))
    else:
        optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = optimizer_class(groups, **arguments)
    if products and args.frobenius_mode != "penalty":
        FrobeniusDecay(optimizer, products, args.product_decay, mode=args.frobenius_mode)
    return optimizer


def decayed_products(model: nn.Module, args: FLAMBeTrainingArguments) -> list[Product]:
    """The products of ``model`` under Frobenius decay; none if ``args`` name no kind."""
    return find_products(model, args.frobenius_decay) if args.frobenius_decay else []


def _lamb_arguments(args: FLAMBeTrainingArguments) -> dict[str, Any]:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


class FLAMBeTrainer(Trainer):
    """Transformers' Trainer with the optimizers and the decay of :class:`FLAMBeTrainingArguments`.

    Works with every model that has the products asked for, stock models included. Everything else, from callbacks to
    checkpoints, is the Trainer's.

    Raises:
        ValueError: If the model has no product of a kind in ``args.frobenius_decay``.
    """

    args: FLAMBeTrainingArguments

    def __init__(
        self, model: nn.Module | None = None, args: FLAMBeTrainingArguments | None = None, **kwargs: Any
    ) -> None:
        args = args or FLAMBeTrainingArguments(output_dir="trainer_output")
        if kwargs.get("optimizers", (None, None))[0] is None and "optimizer_cls_and_kwargs" not in kwargs:
            # The one way to hand over an optimizer that no engine drops: called without arguments, then with the model.
            kwargs["optimizer_cls_and_kwargs"] = (lambda: functools.partial(build_optimizer, args=args), {})
        super().__init__(model, args, **kwargs)
        unwrapped = self.accelerator.unwrap_model(self.model)
        if _averages_over_its_own_batch(unwrapped):
            self.model_accepts_loss_kwargs = False
        self._counts_sequences = "num_sequences_in_batch" in inspect.signature(unwrapped.forward).parameters
        products = decayed_products(unwrapped, args)
        self._penalized = products if args.frobenius_mode == "penalty" else []
        if args.diagnostics_steps:
            watched = products or find_products(unwrapped)
            self.add_callback(DiagnosticsCallback(watched, args.diagnostics_steps, self.log))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """As in Transformers; also tells models with a next-sentence loss over how many sequences it is averaged."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._counts_sequences and num_items_in_batch is not None and "next_sentence_label" in batches[0]:
            count = torch.tensor(sum(len(batch["next_sentence_label"]) for batch in batches), device=device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            for batch in batches:
                batch["num_sequences_in_batch"] = count
        return batches, num_items_in_batch

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in Transformers; a checkpoint that cannot be written whole, for lack of space say, is removed again."""
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            partial = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            if self.is_world_process_zero():
                shutil.rmtree(partial, ignore_errors=True)
            raise RuntimeError(f"could not write {partial}: {error}; earlier checkpoints are as they were") from error

    def create_model_card(self, **stated: Any) -> None:
        """Write the card of the run, with what :func:`~hf_fnl.training.card.write_trainer_card` lets you state."""
        if self.is_world_process_zero():
            write_trainer_card(self, **stated)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in Transformers, with the Frobenius penalty added in training where the mode is ``penalty``."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (self._penalized and model.training):
            return result
        penalty = frobenius_penalty(self._penalized, self.accelerator.unwrap_model(model), self.args.product_decay)
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # A loss normalized over the whole batch is not divided by the accumulation steps afterwards.
            penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty


def _averages_over_its_own_batch(model: nn.Module) -> bool:
    """Whether a stock BERT head ignores ``num_items_in_batch``, although it takes the argument.

    The Trainer would then add up the losses of accumulation steps and processes where it should average them.
    """
    stock = isinstance(model, BertPreTrainedModel) and not hasattr(model, "accepts_loss_kwargs")
    return stock and not isinstance(model, BertLMHeadModel)
