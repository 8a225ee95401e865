"""
The operators of packed and masked layers, `torch.ops.hf_stompp.*`. The reference is what every kernel must equal, bit
for bit.
"""

from __future__ import annotations

import torch

# A family of operators in each: importing it declares them.
from . import activations, cpu, cuda, folding, norm, products, signs, tracing, weights
from .bits import pack_bits, packed_bytes, plus_minus_one, unpack_signs
from .integers import integer_linear, quantize_rows, scale_sums
from .weights import SURROGATES


def has_native_kernels(device: torch.device) -> bool:
    """
    Whether products of bits are faster than products of floats on a device: not so in plain PyTorch.

    Args:
        device (`torch.device`): the kernels for it are loaded, or compiled, when it is first asked about.

    Returns:
        `bool`: on a CPU, whether a native kernel runs; on CUDA, whether one-bit products do.
    """
    if device.type == "cuda":
        return cuda.device(device).product == "bits"
    return device.type == "cpu" and cpu.native_kernels() is not None


def fuses_layer_norm(device: torch.device) -> bool:
    """
    Whether `layer_norm_sign` is one kernel on a device, faster than LayerNorm and `pack_sign` one after the other.

    Args:
        device (`torch.device`): as in [`~hf_stompp.ops.has_native_kernels`].

    Returns:
        `bool`: false on every CPU.
    """
    return device.type == "cuda" and cuda.device(device).native is not None


for _question in (has_native_kernels, fuses_layer_norm):
    # What torch.compiler.assume_constant_result does, which would import the compiler. Compiled models ask too,
    # nothing can be loaded while they are traced, and the answer stays the same.
    _question._dynamo_marked_constant = True  # type: ignore[attr-defined]

pack_sign = torch.ops.hf_stompp.pack_sign.default
binary_linear = torch.ops.hf_stompp.binary_linear.default
binary_linear_sign = torch.ops.hf_stompp.binary_linear_sign.default
byte_linear = torch.ops.hf_stompp.byte_linear.default
layer_norm_sign = torch.ops.hf_stompp.layer_norm_sign.default
sign_product = torch.ops.hf_stompp.sign_product.default
fold = torch.ops.hf_stompp.fold.default
masked_weight = torch.ops.hf_stompp.masked_weight.default
masked_weight_grad = torch.ops.hf_stompp.masked_weight_grad.default
masked_activation = torch.ops.hf_stompp.masked_activation.default
masked_activation_grad = torch.ops.hf_stompp.masked_activation_grad.default

__all__ = [
    "SURROGATES",
    "activations",
    "binary_linear",
    "binary_linear_sign",
    "byte_linear",
    "cpu",
    "cuda",
    "fold",
    "folding",
    "fuses_layer_norm",
    "has_native_kernels",
    "integer_linear",
    "layer_norm_sign",
    "masked_activation",
    "masked_activation_grad",
    "masked_weight",
    "masked_weight_grad",
    "norm",
    "pack_bits",
    "pack_sign",
    "packed_bytes",
    "plus_minus_one",
    "products",
    "quantize_rows",
    "scale_sums",
    "sign_product",
    "signs",
    "tracing",
    "unpack_signs",
    "weights",
]
