"""A fresh model, drawn where it is built; the engine that is to train it divides it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)
Factorize = Callable[[PreTrainedModel], object]


def build(model_class: type[Model], config: PreTrainedConfig, *, factorize: Factorize | None = None) -> Model:
    """Return ``model_class(config)``, made by each process for itself; the first one's values count.

    DDP, FSDP2 and ZeRO send these to the other processes when they start, and divide them there.

    Args:
        model_class: A class of ours or a stock one.
        config: Its configuration.
        factorize: Surgery on the model, such as ``lambda model: factorize_(model, FactorizationConfig(rank=64))``.
    """
    logger.info("drawing the weights of a %s ...", model_class.__name__)  # decomposing large ones takes its time
    model = model_class(config)
    if factorize is not None:
        factorize(model)
    return model
