"""What other packages have to be talked into, each with the reason, the versions and what ends it.

``whole_parameters``: Under DeepSpeed's ZeRO-3, Transformers (5.17 to 5.24) makes every model inside of
``deepspeed.zero.Init``, which divides each layer as soon as its constructor returns. A layer that is then replaced by
one with factors is gone before it can be cut, and files are read into parameters that are not there. There is no option
for it. Ends when ``from_pretrained`` can leave the division to ``deepspeed.initialize``, which divides what is whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import deepspeed


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Let Transformers make and load models whole in here; DeepSpeed divides them when it starts."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    if config is None:
        yield
        return
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)
