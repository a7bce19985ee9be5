"""The optimizer of a run, the products that it decays, and a schedule that Transformers does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from hf_fnl.attention import Product, find_products
from hf_fnl.attention.selectors import ATTENTION_KINDS, Selector
from hf_fnl.optim import FLAMBe, Lamb, parameter_groups
from hf_fnl.optim.frobenius_decay import FrobeniusDecay
from hf_fnl.training.arguments import OUR_OPTIMIZERS, FLAMBeTrainingArguments
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
    return optimizer_and_decay(model, args, dense=dense)[0]


def optimizer_and_decay(
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


def check_decay(args: FLAMBeTrainingArguments) -> None:
    """Raise a ``ValueError`` if ``args`` ask for a decay that an optimizer which was built before does not know of."""
    if args.optim != "flambe" and args.frobenius_decay and args.frobenius_mode != "penalty":
        raise ValueError(
            f"frobenius_decay with frobenius_mode={args.frobenius_mode} is applied by the optimizer, and the one that "
            "was given knows nothing of it: give it a FrobeniusDecay and leave frobenius_decay out, let the trainer "
            "build the optimizer, or set frobenius_mode=penalty"
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


def inverse_sqrt(warmup: int, start: float) -> Callable[[int], float]:
    r"""Return fairseq's inverse square-root schedule, whose warm-up begins at a share of the rate.

    ``start + (1 - start) step / warmup`` below ``warmup``, then ``sqrt(warmup / step)``. Khodak et al. 2021 translate
    with ``start=1``: the rate is constant for ``warmup`` updates.

    Args:
        warmup: Updates before the rate goes down.
        start: Factor of the first update.
    """

    def factor(step: int) -> float:
        return start + (1 - start) * step / warmup if step < warmup else (warmup / step) ** 0.5

    return factor
