"""Layers that hold factors in place of a weight."""

from hf_fnl.layers.base import Factorized, FactorizedMatrix, factorized_layers
from hf_fnl.layers.conv import FactorizedConv2d
from hf_fnl.layers.embedding import FactorizedEmbedding
from hf_fnl.layers.heads import HeadProjection
from hf_fnl.layers.linear import FactorizedLinear
from hf_fnl.layers.linear_pair import LinearPair
from hf_fnl.layers.tensorized import TensorizedConv2d

__all__ = [
    "Factorized",
    "FactorizedConv2d",
    "FactorizedEmbedding",
    "FactorizedLinear",
    "FactorizedMatrix",
    "HeadProjection",
    "LinearPair",
    "TensorizedConv2d",
    "factorized_layers",
]
