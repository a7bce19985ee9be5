"""A Trainer that trains with FLAMBe, LAMB or any other optimizer, and decays products."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_fnl.attention import find_products
from hf_fnl.optim.frobenius_decay import FrobeniusDecay, frobenius_penalty
from hf_fnl.optim.transfer import transfer_
from hf_fnl.training.arguments import FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DecayCallback, DiagnosticsCallback, EpochCallback
from hf_fnl.training.card import write_trainer_card
from hf_fnl.training.checkpoints import CompleteCheckpoints, clean
from hf_fnl.training.engines import check_engine, is_sharded, set_state_dict_type
from hf_fnl.training.finite import check_finite, check_logged
from hf_fnl.training.form import match_checkpoint_, rewrap_
from hf_fnl.training.low_rank_phase import DenseThenLowRank
from hf_fnl.training.optimizers import (
    build_optimizer,
    check_current,
    check_decay,
    decayed_products,
    inverse_sqrt,
    optimizer_and_decay,
)
from hf_fnl.training.profiling import DECAY, ProfilerCallback
from hf_fnl.training.resuming import Resumption, checkpoint_to_take
from hf_fnl.training.run_lock import locked
from hf_fnl.training.streaming import StreamPosition, is_stream, stream_loader
from hf_fnl.utils.modes import preserved_modes
from hf_fnl.utils.processes import first_decides
from hf_fnl.workarounds import forget_evaluation, forget_old_names_, name_causal_loss_, ties_in_one_unit


class FLAMBeTrainer(Trainer):
    """Transformers' Trainer with the optimizers and the decay of :class:`FLAMBeTrainingArguments`.

    Works with every model that has the products asked for, stock models included. Everything else is the Trainer's,
    also the checkpoints, which any Trainer goes on from. Each gets a list of its files when all of it is written, and
    ``train(resume_from_checkpoint=True)`` takes the newest that is complete. The folder of a run is locked while it
    trains.

    Args:
        model: The model to train.
        args: How.
        factorize: Changes the model that it is given, in place, after ``args.dense_steps`` steps; see
            :class:`~hf_fnl.training.DenseThenLowRank`.
        **kwargs: As in Transformers.

    Raises:
        ValueError: If the model has no product of a kind in ``args.frobenius_decay``; an optimizer is given whose
            parameters surgery has replaced, now or when the training begins, or that is to apply a Frobenius decay;
            only one of ``dense_steps`` and ``factorize`` is given; or ``dense_steps`` meets what cannot follow it: an
            optimizer that was built before, ``model_init``, DeepSpeed or FSDP.
    """

    args: FLAMBeTrainingArguments
    model: nn.Module
    lr_scheduler: LRScheduler | None
    label_smoother: Callable[..., Tensor] | None
    model_accepts_loss_kwargs: bool

    def __init__(
        self,
        model: nn.Module | None = None,
        args: FLAMBeTrainingArguments | None = None,
        *,
        factorize: Callable[[nn.Module], object] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or FLAMBeTrainingArguments(output_dir="trainer_output")
        if args.auto_find_batch_size and is_stream(kwargs.get("train_dataset")):
            raise ValueError("auto_find_batch_size changes no batches of a stream: set per_device_train_batch_size")
        if kwargs.get("optimizers", (None, None))[0] is None and kwargs.get("optimizer_cls_and_kwargs") is None:
            # The one way to hand over an optimizer that no engine drops: called without arguments, then with the model.
            kwargs["optimizer_cls_and_kwargs"] = (lambda: self._build_optimizer, {})
        else:
            check_decay(args)
        if model is not None:
            name_causal_loss_(model)
        super().__init__(model, args, **kwargs)
        unwrapped = self.accelerator.unwrap_model(self.model)
        check_engine(self.accelerator, unwrapped, args)
        forget_old_names_(unwrapped)
        self._ties = contextlib.ExitStack()
        self._resumption, self._checkpoints = Resumption(self), CompleteCheckpoints()
        self._stream, self._decay = StreamPosition(), DecayCallback(self._decaying)
        for callback in (self._decay, self._resumption, self._stream, self._checkpoints):  # which lists all their files
            self.add_callback(callback)
        if self.optimizer is not None:
            check_current(self.optimizer, unwrapped)
        base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped  # of PEFT
        self._is_scaling_known = hasattr(base, "accepts_loss_kwargs")
        if self.label_smoother is not None and _shifts_labels(base):
            # The Trainer tells by the names of Transformers' own classes which labels are a token ahead of the logits.
            self.label_smoother = functools.partial(self.label_smoother, shift_labels=True)
        self._counts_sequences = "num_sequences_in_batch" in inspect.signature(base.forward).parameters
        self._is_dense = args.dense_steps > 0
        self._coupled: FrobeniusDecay | None = None
        self._scheduler: LRScheduler | None = None
        self._add_switch(factorize)
        self.add_callback(EpochCallback())
        self._diagnostics = DiagnosticsCallback((), args.diagnostics_steps, self.log)
        if args.diagnostics_steps:
            self.add_callback(self._diagnostics)
        if args.profile_steps and args.process_index == 0:
            self.add_callback(ProfilerCallback(args.profile_steps))
        self._watch_products()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in Transformers."""
        model = super().call_model_init(trial)
        name_causal_loss_(model)
        forget_old_names_(model)
        return model

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Transformers; from the newest complete checkpoint if told ``True``.

        Raises:
            RuntimeError: If another run is at work in ``output_dir``, or a checkpoint could not be written.
            ValueError: If there is no complete checkpoint, the one that is named is damaged or of another run, or
                ``output_dir`` holds checkpoints of another run and nothing was said about them.
        """
        with locked(Path(self.args.output_dir)):
            checkpoint = self._checkpoint_to_take(resume_from_checkpoint)
            if checkpoint is not None and is_stream(self.train_dataset):
                self._stream.take(checkpoint, self.args)
            if checkpoint is not None and self.args.dense_steps:
                self._match_checkpoint(str(checkpoint))
            self._resumption.begin(checkpoint)
            with self._checkpoints.training(self.args):
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        self._check_finite(f"after step {self.state.global_step}")
        return output

    def _checkpoint_to_take(self, given: str | os.PathLike[str] | bool | None) -> Path | None:
        run = Path(self.args.output_dir)
        first_decides(lambda: clean(run))
        if not given and self.args.save_strategy == "no":  # which writes over nothing
            return None
        checkpoint = checkpoint_to_take(run, given, self._checkpoints.written)
        if given and checkpoint is None:
            raise ValueError(f"there is no checkpoint in output_dir {run} to go on from")
        return checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Transformers, on every engine in full, and never weights that are not finite."""
        self._check_finite(f"at step {self.state.global_step}" if _internal_call else "and are to be saved")
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if _internal_call and output_dir is not None:
            self._checkpoints.begin(Path(output_dir))
            config: Any = getattr(self.model, "config", None)
            if plugin is not None and config is not None and self.args.should_save:
                config.save_pretrained(output_dir)
        if plugin is None or _internal_call:
            super().save_model(output_dir, _internal_call)
            if _internal_call:  # the Trainer would remove older checkpoints next; on_save does, when this is complete
                self.args.save_total_limit = None
            return
        kind = plugin.state_dict_type
        set_state_dict_type(plugin, "FULL_STATE_DICT")
        try:
            super().save_model(output_dir)
        finally:
            set_state_dict_type(plugin, kind)

    def _check_finite(self, when: str) -> None:
        check_finite(self.accelerator.unwrap_model(self.model), self.accelerator, when)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Transformers; a loss or gradient norm that is not finite ends the training.

        In fp16 it does not: steps that overflow are skipped.
        """
        super().log(logs, *args, **kwargs)
        if self.accelerator.mixed_precision != "fp16":
            check_logged(logs, self.state.global_step)

    def get_train_dataloader(self) -> DataLoader:
        """As in Transformers; of an iterable data set of ``datasets`` every process reads shards of its own."""
        if not is_stream(self.train_dataset):
            return super().get_train_dataloader()
        return stream_loader(self.train_dataset, self.data_collator, self.args)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Transformers, with the last batch, that ``dataloader_drop_last`` drops in training, and of epoch 0."""
        with _all_batches(self.args):
            loader = super().get_eval_dataloader(*args, **kwargs)
        if hasattr(loader, "set_epoch"):  # one with persistent workers is kept, and would count its evaluations
            loader.set_epoch(0)
        return loader

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """As in Transformers, with the last batch: ``dataloader_drop_last`` drops that of training alone."""
        with _all_batches(self.args):
            return super().get_test_dataloader(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As in Transformers; one that was built before must hold the parameters that the model has now."""
        if self.optimizer is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_current(self.optimizer, self.accelerator.unwrap_model(self.model))
        if self.model_wrapped is self.model and self.accelerator.distributed_type.value.startswith("MULTI_"):
            forget_evaluation(self.accelerator, self.model)
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            # The Trainer hands both to accelerate next, and then creates the schedule.
            self._ties.enter_context(ties_in_one_unit(self.model, self.accelerator.state.fsdp_plugin))
        optimizer = super().create_optimizer(model)
        self._resumption.note(optimizer)
        return optimizer

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer, decay = optimizer_and_decay(model, self.args, dense=self._is_dense)
        for group in optimizer.param_groups if not self._is_dense else ():
            group["lr"] *= self.args.low_rank_lr_scale
        self._coupled = None
        if decay is not None and decay.mode == "coupled" and not self._is_divided_by_deepspeed:
            decay.remove()  # from the steps, before which gradients are clipped
            self._coupled = None if self.is_deepspeed_enabled else decay
        return optimizer

    @property
    def _is_divided_by_deepspeed(self) -> bool:
        """Whether DeepSpeed hands out parts of parameters: then nothing is clipped, and decay may wait for the step."""
        return self.is_deepspeed_enabled and is_sharded(self.accelerator)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in Transformers; coupled Frobenius decay is added to the gradients of an update, before any clipping."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._coupled is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            with record_function(DECAY):
                self._coupled.add_gradients_(1.0 if scaler is None else scaler.get_scale())
            self._decay.is_added = True
        return loss

    def _decaying(self) -> str | None:
        """Return the method that adds decay to an update before the optimizer takes its step, if one does."""
        return "compute_loss" if self._penalized else "training_step" if self._coupled is not None else None

    def schedule(self, num_training_steps: int) -> Callable[[int], float] | None:
        """Return the factor of the learning rate at each step, or ``None`` for a schedule of Transformers."""
        start = self.args.warmup_start
        return inverse_sqrt(self.args.get_warmup_steps(num_training_steps), start) if start else None

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """As in Transformers, or by :meth:`schedule`; anew in each training."""
        self._ties.close()
        factor = self.schedule(num_training_steps)
        if factor is not None and self.lr_scheduler in (None, self._scheduler):
            self.lr_scheduler = self._scheduler = LambdaLR(cast(Optimizer, optimizer or self.optimizer), factor)
        return super().create_scheduler(num_training_steps, optimizer)

    def _watch_products(self) -> None:
        """Find the products that are penalized and watched, in the form that the model has now."""
        model = self.accelerator.unwrap_model(self.model)
        products = decayed_products(model, self.args, dense=self._is_dense)
        mode = self.args.frobenius_mode
        in_loss = mode == "penalty" or (mode == "coupled" and self.is_deepspeed_enabled)
        self._penalized = products if in_loss and not self._is_divided_by_deepspeed else []
        if self.args.diagnostics_steps:
            self._diagnostics.products = products if products or self._is_dense else find_products(model)

    def _add_switch(self, factorize: Callable[[nn.Module], object] | None) -> None:
        """Let the model become low-rank after ``dense_steps``, if there are any."""
        if factorize is None and not self.args.dense_steps:
            return
        if factorize is None or not self.args.dense_steps:
            given = "factorize" if factorize is not None else f"dense_steps={self.args.dense_steps}"
            raise ValueError(
                f"dense_steps and FLAMBeTrainer(factorize=...) need each other, got only {given}; programs that "
                "factorize later are train clm, train translation and, by dense_epochs, train vision"
            )
        obstacles = {
            "an optimizer of your own, which cannot be built again: pass optimizer_cls_and_kwargs": self.optimizer,
            "model_init: pass a model": self.model_init,
            "DeepSpeed, whose engine holds the dense parameters": self.is_deepspeed_enabled,
            "FSDP, which shards the dense parameters": self.is_fsdp_enabled,
        }
        if met := [obstacle for obstacle, present in obstacles.items() if present]:
            raise ValueError(f"dense_steps does not work with {'; '.join(met)}")

        def factorize_and_check(model: nn.Module) -> None:
            factorize(model)
            build_optimizer(model, self.args)  # raises if products to be decayed are missing or frozen

        self._switch = DenseThenLowRank(
            self.args.dense_steps,
            factorize_and_check,
            lr_scale=self.args.low_rank_lr_scale,
            follow=self._follow,
        )
        self.add_callback(self._switch)

    def _follow(self, optimizer: Any, before: Mapping[str, Tensor], model: nn.Module) -> None:
        """Renew all that holds the parameters of a model that just became low-rank."""
        self._rewrap(is_dense=False)
        self.optimizer = None
        built = self.create_optimizer()
        transfer_(optimizer, before, model, target=built)
        # The Trainer's loop, its scheduler and its callbacks hold accelerate's wrapper, which gets a new content.
        optimizer.__setstate__({**optimizer.__getstate__(), "optimizer": built})
        self.optimizer = optimizer

    def _rewrap(self, *, is_dense: bool) -> None:
        """Wrap the model anew, and find its products."""
        self._is_dense = is_dense
        rewrap_(self.model_wrapped, self.accelerator.ddp_handler)
        self._watch_products()

    def _match_checkpoint(self, folder: str) -> None:
        """Give the model the layers that it has in a checkpoint, dense or factorized."""
        is_dense = self._switch.is_ahead(TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)))
        match_checkpoint_(self.model, folder)
        self._rewrap(is_dense=is_dense)
        self.optimizer = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """As in Transformers, and none when all steps are done, where it would train one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if num_items_in_batch is not None:
            self._count_sequences(batches)
        return batches, num_items_in_batch

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As in Transformers."""
        self._count_sequences([inputs])
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _count_sequences(self, batches: list[dict[str, Any]]) -> None:
        """Tell a model with a next-sentence loss over how many sequences of all processes it is averaged."""
        if not (self._counts_sequences and self.model_accepts_loss_kwargs and "next_sentence_label" in batches[0]):
            return
        labels = sum(len(batch["next_sentence_label"]) for batch in batches)
        count = torch.tensor(labels, device=self.args.device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        for batch in batches:
            batch["num_sequences_in_batch"] = count

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; under FSDP2 also before any training, and nothing stays gathered afterwards."""
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):
            with ties_in_one_unit(self.model, self.accelerator.state.fsdp_plugin):
                # accelerate wants an optimizer beside the model; this one is dropped.
                unused = torch.optim.SGD(self.model.parameters(), lr=0.0)
                self.model, _ = self.accelerator.prepare(self.model, unused)
            self.model_wrapped = self.model
        output = super().evaluation_loop(*args, **kwargs)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return output

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
        """As in Transformers, with the Frobenius penalty added in training where the mode is ``penalty``.

        Under DeepSpeed its gradient alone is added where the mode is ``coupled``.

        Raises:
            ValueError: If labels are to be smoothed and Transformers smooths none of this model's.
        """
        smooths = self.label_smoother is not None and self.compute_loss_func is None
        if smooths and ("labels" not in inputs or "next_sentence_label" in inputs):
            raise ValueError(
                "label_smoothing_factor smooths labels of one output, and those of these batches are "
                f"{', '.join(self.label_names)}: set it to 0"
            )
        if num_items_in_batch is not None and model.training and not smooths:
            self._find_scaling(model, inputs)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (self._penalized and model.training):
            return result
        with record_function(DECAY):
            penalty = frobenius_penalty(self._penalized, self.accelerator.unwrap_model(model), self.args.product_decay)
        self._decay.is_added = True
        if self.args.frobenius_mode == "coupled":
            penalty = penalty - penalty.detach()  # its gradient, for an engine that clips within its step
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)  # what a subclass says of its loss
        if is_scaled is None:
            of_the_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = of_the_model or self.compute_loss_func is not None
        if is_scaled:  # by the accumulation steps, so that the Trainer does not divide it by them
            penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty

    def _find_scaling(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out, once, whether a model that takes any keyword divides its loss by ``num_items_in_batch``.

        Many of Transformers do not, and average over their own part of a batch. The Trainer would add up what they
        give for accumulation steps and processes where it is to average it.
        """
        parts = self.current_gradient_accumulation_steps * self.args.world_size
        if self._is_scaling_known or not self.model_accepts_loss_kwargs or self.compute_loss_func or parts == 1:
            return
        with preserved_modes(model), torch.no_grad():
            model.eval()
            counts = (torch.tensor(count, device=self.args.device) for count in (1.0, 2.0))
            outputs = [model(**inputs, num_items_in_batch=count) for count in counts]
        first, second = (each["loss"] if isinstance(each, dict) else each[0] for each in outputs)
        tells = first.isfinite() & (first != 0)  # a part without any label tells nothing
        found = self.accelerator.reduce(torch.stack([tells, tells & (first != second)]).float(), reduction="sum")
        if found[0]:
            self.model_accepts_loss_kwargs, self._is_scaling_known = bool(found[1]), True


@contextlib.contextmanager
def _all_batches(args: FLAMBeTrainingArguments) -> Iterator[None]:
    """While the data loader of an evaluation is made, drop none of its batches."""
    drop_last, args.dataloader_drop_last = args.dataloader_drop_last, False
    try:
        yield
    finally:
        args.dataloader_drop_last = drop_last


def _shifts_labels(model: nn.Module) -> bool:
    is_seq2seq = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return getattr(model, "loss_type", None) == "ForCausalLM" and not is_seq2seq
