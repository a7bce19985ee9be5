"""Products in a model: every matrix that it holds only as factors.

A product names its factors; it never keeps their tensors, so a wrapper may replace the parameters of a model (as
``accelerate`` does under FSDP) and the products stay right.
"""

from hf_fnl.attention.adapters import register_attention
from hf_fnl.attention.find import find_products
from hf_fnl.attention.products import Factor, Product, beside_factors
from hf_fnl.attention.projections import AttentionProjections, Section
from hf_fnl.attention.selectors import KINDS

__all__ = [
    "KINDS",
    "AttentionProjections",
    "Factor",
    "Product",
    "Section",
    "beside_factors",
    "find_products",
    "register_attention",
]
