"""A Trainer that trains with FLAMBe, LAMB or any other optimizer, and decays products."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.profiler import record_function
from torch.utils.data import DataLoader
from transformers import BertLMHeadModel, BertPreTrainedModel, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_fnl.attention import Product, find_products
from hf_fnl.attention.selectors import ATTENTION_KINDS, Selector
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.optim.frobenius_decay import FrobeniusDecay, frobenius_penalty
from hf_fnl.optim.transfer import transfer_
from hf_fnl.training.arguments import OUR_OPTIMIZERS, FLAMBeTrainingArguments
from hf_fnl.training.callbacks import DiagnosticsCallback, EpochCallback
from hf_fnl.training.card import write_trainer_card
from hf_fnl.training.checkpoints.resume import tied_are_not_missing
from hf_fnl.training.checkpoints.trainer import CheckpointingTrainer
from hf_fnl.training.engines import is_sharded
from hf_fnl.training.finite import FiniteSteps
from hf_fnl.training.form import rewrap_, take_form_
from hf_fnl.training.low_rank_phase import DenseThenLowRank
from hf_fnl.training.profiling import DECAY, FORWARD, PASSES, ProfilerCallback
from hf_fnl.training.schedules import schedule_of
from hf_fnl.training.streaming import StreamPosition, is_stream, stream_loader
from hf_fnl.utils.suggest import listed


def build_optimizer(model: nn.Module, args: FLAMBeTrainingArguments, *, dense: bool = False) -> torch.optim.Optimizer:
    """The optimizer that ``args`` describe, over named groups of the trainable parameters of ``model``.

    Args:
        model: Unwrapped.
        args: The optimizer and the decay.
        dense: Whether the model is in its dense phase; see :func:`decayed_products`. FLAMBe without a product is LAMB.

    Raises:
        ValueError: If ``args.frobenius_decay`` names a kind of product that the model does not have.
    """
    return _optimizer_and_decay(model, args, dense=dense)[0]


def _optimizer_and_decay(
    model: nn.Module, args: FLAMBeTrainingArguments, *, dense: bool
) -> tuple[torch.optim.Optimizer, FrobeniusDecay | None]:
    """:func:`build_optimizer`, and what decays products in its steps, if that is not the optimizer itself."""
    products = decayed_products(model, args, dense=dense)
    flambe = args.optim == "flambe" and bool(products)
    groups = parameter_groups(
        model,
        weight_decay=args.weight_decay,
        products=products,
        frobenius_decay=args.product_decay if flambe else 0.0,
        factor_decay="weight" if dense else args.factor_decay,
        decay_vectors=args.decay_vectors,
    )
    if flambe:
        return FLAMBe(groups, products=products, **_lamb_arguments(args)), None
    if args.optim in OUR_OPTIMIZERS:
        optimizer: torch.optim.Optimizer = Lamb(groups, **_lamb_arguments(args))
    else:
        optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = optimizer_class(groups, **arguments)
    if not products or args.frobenius_mode == "penalty":
        return optimizer, None
    return optimizer, FrobeniusDecay(optimizer, products, args.product_decay, mode=args.frobenius_mode)


def check_current(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise a ``ValueError`` if an optimizer holds parameters in the place of others that a model trains.

    That is so if the model went through surgery after the optimizer was built. An optimizer may hold fewer parameters
    than the model has, or those of another module, too, but not both.

    Args:
        optimizer: Built before.
        model: Unwrapped.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    named = dict(model.named_parameters(remove_duplicate=False))
    stale = held - set(named.values())
    new = [name for name, parameter in named.items() if parameter.requires_grad and parameter not in held]
    if stale and new:
        names: dict[Tensor, str] = {}
        for group in optimizer.param_groups:
            names.update(zip(group["params"], group.get("param_names", ()), strict=False))
        old = sorted(names.get(parameter, f"one of shape {tuple(parameter.shape)}") for parameter in stale)
        raise ValueError(
            f"the optimizer holds {len(stale)} parameters that the {type(model).__name__} no longer has "
            f"({listed(old)}), and not its {listed(new)}: build the optimizer after the model was changed, or let the "
            "trainer build it"
        )


def decayed_products(model: nn.Module, args: FLAMBeTrainingArguments, *, dense: bool = False) -> list[Product]:
    """The products of ``model`` under Frobenius decay; none if ``args`` name no kind.

    Args:
        model: Unwrapped.
        args: The kinds of products.
        dense: Whether the layers of the model are still to become products; then only those of attentions are listed.
    """
    kinds = args.frobenius_decay or []
    if dense:
        kinds = [kind for kind in kinds if Selector.parse(kind).kind in ATTENTION_KINDS]
    return find_products(model, kinds) if kinds else []


def _lamb_arguments(args: FLAMBeTrainingArguments) -> dict[str, Any]:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


class FLAMBeTrainer(CheckpointingTrainer):
    """Transformers' Trainer with the optimizers and the decay of :class:`FLAMBeTrainingArguments`.

    Works with every model that has the products asked for, stock models included. Everything else, from callbacks to
    checkpoints, is the Trainer's.

    Args:
        model: The model to train.
        args: How.
        factorize: Changes the model that it is given, in place, after ``args.dense_steps`` steps; see
            :class:`~hf_fnl.training.DenseThenLowRank`.
        **kwargs: As in Transformers.

    Raises:
        ValueError: If the model has no product of a kind in ``args.frobenius_decay``; an optimizer is given whose
            parameters surgery has replaced, now or when the training begins; only one of ``dense_steps`` and
            ``factorize`` is given; or ``dense_steps`` meets what cannot follow it: an optimizer that was built before,
            ``model_init``, DeepSpeed or FSDP.
    """

    lr_scheduler: LRScheduler | None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: FLAMBeTrainingArguments | None = None,
        *,
        factorize: Callable[[nn.Module], object] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or FLAMBeTrainingArguments(output_dir="trainer_output")
        if kwargs.get("optimizers", (None, None))[0] is None and "optimizer_cls_and_kwargs" not in kwargs:
            # The one way to hand over an optimizer that no engine drops: called without arguments, then with the model.
            kwargs["optimizer_cls_and_kwargs"] = (lambda: self._build_optimizer, {})
        super().__init__(model, args, **kwargs)
        self._stream = StreamPosition()
        self.add_callback(self._stream)  # before what lists the files of a checkpoint
        unwrapped = self.accelerator.unwrap_model(self.model)
        if self.optimizer is not None:
            check_current(self.optimizer, unwrapped)
        if _averages_over_its_own_batch(unwrapped):
            self.model_accepts_loss_kwargs = False
        self._counts_sequences = "num_sequences_in_batch" in inspect.signature(unwrapped.forward).parameters
        self._is_dense = args.dense_steps > 0
        self._coupled: FrobeniusDecay | None = None
        self._finite = FiniteSteps(lambda: self.accelerator, args.nonfinite_gradient)
        self.add_callback(self._finite)
        self._add_switch(factorize)
        self.add_callback(EpochCallback())
        self._diagnostics = DiagnosticsCallback((), args.diagnostics_steps, self.log)
        if args.diagnostics_steps:
            self.add_callback(self._diagnostics)
        self._watch_products()
        if args.profile_steps is not None:
            self.add_callback(ProfilerCallback(args.profile_steps))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers."""
        with tied_are_not_missing(self.accelerator.unwrap_model(self.model)):
            return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As in Transformers; of an iterable data set of ``datasets`` every process reads shards of its own."""
        if not is_stream(self.train_dataset):
            return super().get_train_dataloader()
        return stream_loader(self.train_dataset, self.data_collator, self.args)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Transformers, beside a loss with the number of steps that were skipped, if any."""
        if self._finite.skipped and "loss" in logs:
            logs["skipped_steps"] = self._finite.skipped
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Transformers; one that was built before must hold the parameters that the model has now."""
        if self.optimizer is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_current(self.optimizer, self.accelerator.unwrap_model(self.model))
        return super().create_optimizer(model)

    def _build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer, decay = _optimizer_and_decay(model, self.args, dense=self._is_dense)
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
        with record_function(PASSES):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite.note(loss)
        if self._coupled is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            with record_function(DECAY):
                self._coupled.add_gradients_(1.0 if scaler is None else scaler.get_scale())
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """As in Transformers, or the schedule of ``args.lr_power`` or ``args.warmup_start``."""
        schedule = schedule_of(self.args, num_training_steps)
        if self.lr_scheduler is None and schedule is not None:
            self.lr_scheduler = LambdaLR(cast(Optimizer, optimizer or self.optimizer), schedule)
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
            raise ValueError(f"dense_steps and FLAMBeTrainer(factorize=...) need each other, got only {given}")
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
        self._take_up(is_dense=False)
        self.optimizer = None
        built = self.create_optimizer()
        transfer_(optimizer, before, model, target=built)
        # The Trainer's loop, its scheduler and its callbacks hold accelerate's wrapper, which gets a new content.
        optimizer.__setstate__({**optimizer.__getstate__(), "optimizer": built})
        self.optimizer = optimizer

    def _take_up(self, *, is_dense: bool) -> None:
        """Wrap the model anew, and find its products."""
        self._is_dense = is_dense
        rewrap_(self.model_wrapped, self.accelerator.ddp_handler)
        self._watch_products()

    def _take_form(self, folder: str) -> None:
        """Bring the model into the form that it has in a checkpoint."""
        is_dense = self._switch.is_ahead(TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME)))
        take_form_(self.model, folder)
        self._take_up(is_dense=is_dense)
        self.optimizer = None

    def _before_resuming(self, checkpoint: str) -> None:
        """A stream goes on where it stood; with ``dense_steps`` the model takes the form that the checkpoint has."""
        if is_stream(self.train_dataset):
            self._stream.take(checkpoint, self.args)
        if self.args.dense_steps:
            self._take_form(checkpoint)

    def _load_best_model(self) -> None:
        """As in Transformers; the best model may be that of the other phase."""
        if self.args.dense_steps:
            self._take_form(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _get_num_items_in_batch(self, batches: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        """As in Transformers; also tells models with a next-sentence loss over how many sequences it is averaged."""
        num_items_in_batch = super()._get_num_items_in_batch(batches, device)
        if self._counts_sequences and num_items_in_batch is not None and "next_sentence_label" in batches[0]:
            count = torch.tensor(sum(len(batch["next_sentence_label"]) for batch in batches), device=device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum()
            for batch in batches:
                batch["num_sequences_in_batch"] = count
        return num_items_in_batch

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
        """
        with record_function(FORWARD):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not (self._penalized and model.training):
            return result
        penalty = self._penalty(model)
        if self.args.frobenius_mode == "coupled":
            penalty = penalty - penalty.detach()  # its gradient, for an engine that clips within its step
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            # A loss normalized over the whole batch is not divided by the accumulation steps afterwards.
            penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, *result[1:]) if return_outputs else result + penalty

    def _penalty(self, model: nn.Module) -> Tensor:
        with record_function(DECAY):
            return frobenius_penalty(self._penalized, self.accelerator.unwrap_model(model), self.args.product_decay)


def _averages_over_its_own_batch(model: nn.Module) -> bool:
    """Whether a stock BERT head ignores ``num_items_in_batch``, although it takes the argument.

    The Trainer would then add up the losses of accumulation steps and processes where it should average them.
    """
    stock = isinstance(model, BertPreTrainedModel) and not hasattr(model, "accepts_loss_kwargs")
    return stock and not isinstance(model, BertLMHeadModel)
