"""Parameters that an engine divides among processes."""

from __future__ import annotations

import torch
from torch import Tensor


def full_shape(parameter: Tensor) -> torch.Size:
    """Shape of a parameter before it was divided; DeepSpeed's ZeRO-3 leaves an empty vector in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 divides a parameter among processes, which is then empty but while it is gathered."""
    return hasattr(parameter, "ds_tensor")
