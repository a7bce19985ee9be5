"""Factorizing the layers of any model in place, and multiplying them out again."""

from hf_fnl.surgery.factorize import Factorization, Replacement, factorize_
from hf_fnl.surgery.record import QUANT_METHOD, update_records_
from hf_fnl.surgery.restore import merge_, restore_
from hf_fnl.surgery.to_linear import to_linear_

__all__ = [
    "QUANT_METHOD",
    "Factorization",
    "Replacement",
    "factorize_",
    "merge_",
    "restore_",
    "to_linear_",
    "update_records_",
]
