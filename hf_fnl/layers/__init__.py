"""Layers that hold factors in place of a weight."""

from hf_fnl.layers.base import Factorized
from hf_fnl.layers.conv import FactorizedConv2d
from hf_fnl.layers.embedding import FactorizedEmbedding
from hf_fnl.layers.linear import FactorizedLinear

__all__ = ["Factorized", "FactorizedConv2d", "FactorizedEmbedding", "FactorizedLinear"]
