"""A Trainer whose engine runs the optimizer that was asked for, on whatever model."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.engines.checks import check_engine, check_optimizer, innermost
from hf_fnl.training.engines.handover import forget_evaluation, reshard_, shard_for_evaluation, ties_in_one_unit


class EngineTrainer(Trainer):
    """Transformers' Trainer under DDP, FSDP2 and DeepSpeed, with what these need beside it.

    Raises:
        ValueError: If the engine cannot do what is asked for; see :func:`~hf_fnl.training.engines.check_engine`.
    """

    args: FLAMBeTrainingArguments
    model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_engine(self.accelerator, self.accelerator.unwrap_model(self.model), self.args)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As in Transformers; what is built here is what the engine has to run."""
        self._built = super().create_optimizer(model)
        return self._built

    def running_optimizer(self) -> Optimizer:
        """The optimizer that runs, without the wrappers of accelerate and DeepSpeed."""
        return innermost(self.optimizer)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; under FSDP2 also before any training."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            with ties_in_one_unit(self.model, self.accelerator.state.fsdp_plugin):
                self.model = self.model_wrapped = shard_for_evaluation(self.accelerator, self.model)
        output = super().evaluation_loop(*args, **kwargs)
        reshard_(self.model)
        return output

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, which hands model and optimizer over to the engine here."""
        if self.model_wrapped is self.model and self.accelerator.distributed_type.value.startswith("MULTI_"):
            forget_evaluation(self.accelerator, self.model)
        with ties_in_one_unit(self.model, getattr(self.accelerator.state, "fsdp_plugin", None)):
            prepared = super()._prepare_for_training(*args, **kwargs)
        check_optimizer(self.optimizer, self._built)
        return prepared
