"""
The operators of packed layers, `torch.ops.hf_stompp.*`. The reference is what every kernel must equal, bit for bit.
"""

from __future__ import annotations

import torch

# Importing it registers the CPU implementation.
from . import cpu, schema
from .reference import fold, integer_linear, pack_bits, packed_bytes, plus_minus_one, unpack_signs


pack_sign = torch.ops.hf_stompp.pack_sign.default
binary_linear = torch.ops.hf_stompp.binary_linear.default
binary_linear_sign = torch.ops.hf_stompp.binary_linear_sign.default

__all__ = [
    "binary_linear",
    "binary_linear_sign",
    "cpu",
    "fold",
    "integer_linear",
    "pack_bits",
    "pack_sign",
    "packed_bytes",
    "plus_minus_one",
    "schema",
    "unpack_signs",
]
