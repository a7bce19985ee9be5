"""Forwards that take what the stock forwards take, and keyword arguments of their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, TypeVar

from transformers.utils.generic import can_return_tuple

F = TypeVar("F", bound=Callable[..., Any])


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
