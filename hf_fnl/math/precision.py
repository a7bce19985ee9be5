"""Products in the dtype of their factors, whatever autocast makes of others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context without autocast on a device, some of which have none."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    off: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return off
