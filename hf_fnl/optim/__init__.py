"""Optimizers that know products."""

from hf_fnl.optim.flambe import FLAMBe
from hf_fnl.optim.groups import parameter_groups
from hf_fnl.optim.lamb import Lamb

__all__ = ["FLAMBe", "Lamb", "parameter_groups"]
