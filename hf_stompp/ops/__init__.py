"""
The operators of packed and masked layers, `torch.ops.hf_stompp.*`. The reference is what every kernel must equal, bit
for bit.
"""

from __future__ import annotations

import torch

# Importing them registers the implementations of devices.
from . import cpu, cuda, schema
from .reference import SURROGATES, fold, integer_linear, pack_bits, packed_bytes, plus_minus_one, unpack_signs


def has_native_kernels(device: torch.device) -> bool:
    """Whether products of bits are faster than products of floats there: not so in plain PyTorch."""
    return device.type == "cpu" and cpu.native_kernels() is not None


pack_sign = torch.ops.hf_stompp.pack_sign.default
binary_linear = torch.ops.hf_stompp.binary_linear.default
binary_linear_sign = torch.ops.hf_stompp.binary_linear_sign.default
sign_product = torch.ops.hf_stompp.sign_product.default
masked_weight = torch.ops.hf_stompp.masked_weight.default
masked_weight_grad = torch.ops.hf_stompp.masked_weight_grad.default
masked_activation = torch.ops.hf_stompp.masked_activation.default
masked_activation_grad = torch.ops.hf_stompp.masked_activation_grad.default

__all__ = [
    "SURROGATES",
    "binary_linear",
    "binary_linear_sign",
    "cpu",
    "cuda",
    "fold",
    "has_native_kernels",
    "integer_linear",
    "masked_activation",
    "masked_activation_grad",
    "masked_weight",
    "masked_weight_grad",
    "pack_bits",
    "pack_sign",
    "packed_bytes",
    "plus_minus_one",
    "schema",
    "sign_product",
    "unpack_signs",
]
