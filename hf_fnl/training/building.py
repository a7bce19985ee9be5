"""A fresh model, in the layout of the engine that is to train it."""

from __future__ import annotations

import logging
from typing import Any, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from hf_fnl.models.base import FactorizedPreTrainedModel
from hf_fnl.models.sharded_init import Factorize, make_partitioned, make_whole
from hf_fnl.utils.processes import process

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=PreTrainedModel)


def build(model_class: type[Model], config: PreTrainedConfig, *, factorize: Factorize | None = None) -> Model:
    """What ``model_class(config)`` is in one process, made by all processes together; all of them call this.

    The matrices that are decomposed are shared out. Each process has afterwards what its engine wants it to have:

    - under DeepSpeed's ZeRO-3 its part of every parameter;
    - under FSDP2 with ``fsdp_cpu_ram_efficient_loading`` the first process the whole model and the others none of it:
      accelerate sends them their parts;
    - else, under DDP say, the whole model.

    Training arguments must be parsed before: they say which engine runs.

    Args:
        model_class: A class of ours or a stock one.
        config: Its configuration.
        factorize: Surgery on the model, such as ``lambda model: factorize_(model, FactorizationConfig(rank=64))``. With
            several processes its ranks must not depend on weights, which are not drawn before.
    """

    def make() -> Any:
        return model_class(config)

    logger.info("drawing the weights of a %s ...", model_class.__name__)  # decomposing large ones takes its time
    if is_deepspeed_zero3_enabled():
        return make_partitioned(make, factorize)
    rank, count = process()
    sends_parts = is_fsdp_enabled() and count > 1
    decomposes = factorize is not None or issubclass(model_class, FactorizedPreTrainedModel)
    if sends_parts or (count > 1 and decomposes):
        return make_whole(make, factorize, keep=rank == 0 or not sends_parts)
    model = make()
    if factorize is not None:
        factorize(model)
    return model
