"""Forwards that take what the stock forwards take, keyword arguments of their own, and nothing else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

F = TypeVar("F", bound=Callable[..., Any])

CAUSAL_LOSS_INPUTS = ("num_items_in_batch", "ignore_index", "shift_labels")  # of ForCausalLMLoss


def extends(stock_forward: Callable[..., Any]) -> Callable[[F], F]:
    """Decorate a forward that takes what a stock forward takes, and keyword arguments of its own.

    The decorated function is given everything by keyword. Its signature, which ``generate`` and the Trainer read, is
    that of the stock forward of the installed release, followed by its own keyword arguments.
    """
    stock = list(inspect.signature(stock_forward).parameters.values())
    positional = [p.name for p in stock[1:] if p.kind is Parameter.POSITIONAL_OR_KEYWORD]

    def decorate(forward: F) -> F:
        parameters = inspect.signature(forward).parameters.values()
        own = [p for p in parameters if p.kind is Parameter.KEYWORD_ONLY and p.name not in positional]

        @can_return_tuple
        @functools.wraps(forward)
        def named(self: Any, *args: Any, **inputs: Any) -> Any:
            if len(args) > len(positional):
                raise TypeError(f"{type(self).__name__}.forward() takes {len(positional)} inputs, got {len(args)}")
            return forward(self, **dict(zip(positional, args, strict=False)), **inputs)

        fixed = [p for p in stock if p.kind is not Parameter.VAR_KEYWORD]
        named.__signature__ = inspect.Signature([*fixed, *own, *(p for p in stock if p not in fixed)])
        return named

    return decorate


def refuse_unknown_inputs_(model: PreTrainedModel, more: Iterable[str] = ()) -> None:
    """Let calls of a model raise a ``TypeError`` for an argument that nothing knows, which a stock forward ignores.

    Known are the arguments of the forward and of the backbone's, to which heads hand what they do not name,
    ``TransformersKwargs``, and those of the attention kernel.

    Args:
        model: The model that is called; what it hands to models inside of it is not looked at.
        more: Arguments that the forward hands to its loss function.
    """
    forwards = model.forward, model.base_model.forward
    parameters = [p for forward in forwards for p in inspect.signature(forward).parameters.values()]
    named = {p.name for p in parameters if p.kind is not Parameter.VAR_KEYWORD}
    if "cache" in named:  # Transformers 5.24 renamed it, and takes the old name, too
        named.add("past_key_values")
    known = frozenset(named | set(more) | TransformersKwargs.__annotations__.keys() | {"return_dict"})
    model.register_forward_pre_hook(functools.partial(_check_inputs, known), with_kwargs=True)


def _check_inputs(known: frozenset[str], model: PreTrainedModel, args: Any, inputs: dict[str, Any]) -> None:
    unknown = [name for name in inputs if name not in known]
    # The paged cache of continuous batching comes with others, which it reads itself.
    if not unknown or not isinstance(inputs.get("cache"), Cache | None):
        return
    kernel = ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation)
    of_kernel = () if kernel is None else inspect.signature(kernel).parameters
    if unknown := [name for name in unknown if name not in of_kernel]:
        raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {unknown[0]!r}")
