"""Forwards that take what the stock forwards take, whatever a release of Transformers calls it, and nothing else."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, TypeVar

from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Model
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

F = TypeVar("F", bound=Callable[..., Any])

CACHE, _OTHER_CACHE = "cache", "past_key_values"  # the name of a forward's cache since Transformers 5.24, and before
if CACHE not in inspect.signature(GPT2Model.forward).parameters:
    CACHE, _OTHER_CACHE = _OTHER_CACHE, CACHE


def extends(stock_forward: Callable[..., Any], *unnamed: Callable[..., Any]) -> Callable[[F], F]:
    """Decorate a forward that takes what a stock forward takes, and keyword arguments of its own.

    The decorated function is given everything by keyword, and ``return_dict=True``. Its signature, which ``generate``
    and the Trainer read, is that of the stock forward followed by its own keyword arguments. The cache may be given by
    each name that a release of Transformers has for it. Arguments that neither forward takes, that are no
    ``TransformersKwargs`` and that the attention kernel of the model does not name, raise a ``TypeError``.

    Args:
        stock_forward: The stock forward.
        unnamed: Functions to which the stock forward hands what it does not name, such as its loss function. Their
            arguments are taken, too, and stay out of the signature: what is called a label there, the Trainer expects.
    """
    stock = list(inspect.signature(stock_forward).parameters.values())
    positional = [p.name for p in stock[1:] if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    others = {name for function in unnamed for name in inspect.signature(function).parameters}

    def decorate(forward: F) -> F:
        own = [
            p
            for p in inspect.signature(forward).parameters.values()
            if p.kind is Parameter.KEYWORD_ONLY and p.name not in {*positional, *others}
        ]
        known = {*positional, *(p.name for p in own), *others, *TransformersKwargs.__annotations__, "return_dict"}

        @can_return_tuple
        @functools.wraps(forward)
        def named(self: PreTrainedModel, *args: Any, **inputs: Any) -> Any:
            if len(args) > len(positional):
                raise TypeError(f"{_name(self)} takes {len(positional)} positional arguments, got {len(args)}")
            _rename_cache(inputs)
            if inputs.keys() - known:
                _check_known(self, inputs, known)
            return forward(self, **dict(zip(positional, args, strict=False)), **(inputs | {"return_dict": True}))

        variable = [p for p in stock if p.kind is Parameter.VAR_KEYWORD]
        fixed = [p for p in stock if p.kind is not Parameter.VAR_KEYWORD]
        named.__signature__ = inspect.Signature([*fixed, *own, *variable])
        return named

    return decorate


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__}.forward()"


def _rename_cache(inputs: dict[str, Any]) -> None:
    """Call the cache as the stock forward does."""
    if _is_paged(inputs) or _OTHER_CACHE not in inputs:
        return
    cache = inputs.pop(_OTHER_CACHE)
    if cache is not None and inputs.get(CACHE) is not None:
        raise TypeError(f"give the cache once, got {CACHE} and {_OTHER_CACHE}")
    if cache is not None:
        inputs[CACHE] = cache


def _is_paged(inputs: dict[str, Any]) -> bool:
    """Whether the cache is that of continuous batching, which every release calls ``cache``."""
    return not isinstance(inputs.get("cache"), Cache | None)


def _check_known(model: PreTrainedModel, inputs: dict[str, Any], known: set[str]) -> None:
    """Raise for inputs that nothing knows; a paged cache comes with others, which it reads itself."""
    kernel = ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation)
    unknown = inputs.keys() - known - (set() if kernel is None else inspect.signature(kernel).parameters.keys())
    if unknown and not _is_paged(inputs):
        raise TypeError(f"{_name(model)} got an unexpected keyword argument {sorted(unknown)[0]!r}")
