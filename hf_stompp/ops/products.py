"""
Linear layers with packed weights, on bits (`binary_linear`), with bits of the result (`binary_linear_sign`), and on
bytes (`byte_linear`).
"""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import cuda, eight_bit, signs
from .bits import at_least, empty_bits, pack_bools, packed_bytes, plus_minus_one, unpack_signs
from .cpu import NativeKernels, check_status
from .integers import integer_linear, quantize_rows, scale_sums
from .native import DTYPES
from .operators import FLOATS, check_device, check_floats, check_packed_weight, check_vector, declare


BINARY_LINEAR = (
    "binary_linear(Tensor input, Tensor? threshold, Tensor packed_weight, int in_features, Tensor scale, "
    "Tensor? bias, ScalarType dtype) -> Tensor"
)

BINARY_LINEAR_SIGN = (
    "binary_linear_sign(Tensor input, Tensor? threshold, Tensor packed_weight, int in_features, Tensor scale, "
    "Tensor? bias, ScalarType dtype, Tensor? output_threshold) -> Tensor"
)

BYTE_LINEAR = (
    "byte_linear(Tensor input, Tensor packed_weight, int in_features, Tensor scale, Tensor? bias, ScalarType dtype) "
    "-> Tensor"
)

TOO_MANY_FEATURES = 2**24
"""From so many features on float32, in which the reference adds, does not hold every sum."""

MAX_BYTE_FEATURES = (2**31 - 1) // 254
"""More features than this could give a sum of bytes of which int32 does not hold the double, which kernels form."""


def _check(
    op: str,
    input: Tensor,
    threshold: Tensor | None,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    output_threshold: Tensor | None = None,
) -> None:
    is_bits = input.dtype == torch.uint8
    if not is_bits and input.dtype not in FLOATS:
        raise TypeError(
            f"hf_stompp::{op}: input must be float32, bfloat16, float16, or uint8 bits of pack_sign, got {input.dtype}"
        )
    if dtype not in FLOATS:
        raise TypeError(f"hf_stompp::{op}: dtype must be float32, bfloat16 or float16, got {dtype}")
    if not 1 <= in_features < TOO_MANY_FEATURES:
        raise ValueError(
            f"hf_stompp::{op}: in_features must be at least 1 and below {TOO_MANY_FEATURES}, or sums are not exact; "
            f"got {in_features}"
        )
    if is_bits and threshold is not None:
        raise ValueError(f"hf_stompp::{op}: a threshold was given for an input that is bits already")
    last, shape = packed_bytes(in_features) if is_bits else in_features, input.shape
    if not shape or shape[-1] != last:
        raise ValueError(
            f"hf_stompp::{op}: the last dimension of the input must be {last} "
            f"({'bytes' if is_bits else 'in_features'}), got shape {tuple(shape)}"
        )
    check_packed_weight(op, packed_weight, in_features)
    out_features, device = packed_weight.shape[0], input.device
    check_device(op, "packed_weight", packed_weight, device)
    check_vector(op, "threshold", threshold, in_features, device)
    check_vector(op, "scale", scale, out_features, device)
    check_vector(op, "bias", bias, out_features, device)
    check_vector(op, "output_threshold", output_threshold, out_features, device)


def _empty(input: Tensor, packed_weight: Tensor, dtype: torch.dtype) -> Tensor:
    return input.new_empty(*input.shape[:-1], packed_weight.shape[0], dtype=dtype)


def _linear_meta(*layer: Any) -> Tensor:
    _check("binary_linear", *layer)
    return _empty(layer[0], layer[2], layer[6])


def _sign_meta(*layer: Any) -> Tensor:
    _check("binary_linear_sign", *layer)
    return empty_bits(layer[0], layer[2].shape[0])


def _byte_meta(input: Tensor, packed_weight: Tensor, in_features: int, *layer: Any) -> Tensor:
    check_floats("byte_linear", input)
    if in_features > MAX_BYTE_FEATURES:
        raise ValueError(
            f"hf_stompp::byte_linear: in_features must be at most {MAX_BYTE_FEATURES}, or sums may exceed int32; got "
            f"{in_features}"
        )
    _check("byte_linear", input, None, packed_weight, in_features, *layer)
    return _empty(input, packed_weight, layer[2])


def binary_linear(
    input: Tensor,
    threshold: Tensor | None,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """
    A linear layer on the signs of its input, with a packed weight: [`integer_linear`] of packed signs.

    Args:
        input (`Tensor` of shape `(..., in_features)` or `(..., packed_bytes(in_features))`): floats to be signed, or
            uint8 bits from [`pack_sign`].
        threshold (`Tensor` of shape `(in_features,)`, *optional*): float32, of the signs; 0 when not given, and none
            for bits.
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8. Bits beyond `in_features`
            must be zero, here and in the input: kernels count them.
        in_features (`int`): at least 1, below 2^24.
        scale (`Tensor` of shape `(out_features,)`): float32.
        bias (`Tensor` of shape `(out_features,)`, *optional*): float32.
        dtype (`torch.dtype`): of the result: float32, bfloat16 or float16.

    Returns:
        `Tensor` of shape `(..., out_features)`: of `dtype`.
    """
    if input.dtype == torch.uint8:
        signs = unpack_signs(input, in_features)
    else:
        signs = plus_minus_one(at_least(input, threshold), torch.float32)
    return integer_linear(signs, unpack_signs(packed_weight, in_features), scale, bias, dtype)


def binary_linear_sign(
    input: Tensor,
    threshold: Tensor | None,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    output_threshold: Tensor | None,
) -> Tensor:
    """
    [`binary_linear`], of whose result only the packed signs are kept.

    Args:
        output_threshold (`Tensor` of shape `(out_features,)`, *optional*): float32; 0 when not given.
        input, threshold, packed_weight, in_features, scale, bias, dtype: as in [`binary_linear`]. The result is
            rounded to `dtype` before it is compared.

    Returns:
        `Tensor` of shape `(..., packed_bytes(out_features))`: uint8.
    """
    output = binary_linear(input, threshold, packed_weight, in_features, scale, bias, dtype)
    return pack_bools(at_least(output, output_threshold))


def byte_linear(
    input: Tensor,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """
    A linear layer with a packed weight on floats that are rounded to 8 bits, see [`quantize_rows`]. The sums are exact
    integers.

    Args:
        input (`Tensor` of shape `(..., in_features)`): float32, bfloat16 or float16.
        packed_weight (`Tensor` of shape `(out_features, packed_bytes(in_features))`): uint8.
        in_features (`int`): at least 1, and so few that no sum exceeds int32.
        scale (`Tensor` of shape `(out_features,)`): float32.
        bias (`Tensor` of shape `(out_features,)`, *optional*): float32.
        dtype (`torch.dtype`): of the result: float32, bfloat16 or float16.

    Returns:
        `Tensor` of shape `(..., out_features)`: rounded to float32 after the sum, the product with the scale of the
            row, the product with `scale` and the sum with the bias, then to `dtype`.
    """
    codes, code_scale = quantize_rows(input)
    # What holds every sum.
    work = torch.float32 if 127 * in_features < 2**24 else torch.float64
    with torch.autocast(input.device.type, enabled=False):
        sums = F.linear(codes.to(work), unpack_signs(packed_weight, in_features).to(work))
        # An integer has no -0.0.
        return scale_sums(sums.to(torch.int32).float(), scale, bias, dtype, code_scale)


_CPU_RECORD = struct.Struct("16q")  # struct hf_stompp_product


def _on_cpu(
    kernels: NativeKernels,
    result: Tensor,
    input: Tensor,
    threshold: Tensor | None,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    output_threshold: Tensor | None = None,
    activation_bits: int = 1,
) -> Tensor:
    # Written out: with one row, most of the time is the call. Names, so that a copy made here lives until it returns.
    input, packed_weight, scale = input.contiguous(), packed_weight.contiguous(), scale.contiguous()
    threshold = None if threshold is None else threshold.contiguous()
    bias = None if bias is None else bias.contiguous()
    output_threshold = None if output_threshold is None else output_threshold.contiguous()
    is_bits = result.dtype == torch.uint8
    record = _CPU_RECORD.pack(
        kernels.number,
        torch.get_num_threads(),
        input.data_ptr(),
        DTYPES[input.dtype],
        0 if threshold is None else threshold.data_ptr(),
        packed_weight.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        input.numel() // input.shape[-1],
        in_features,
        packed_weight.shape[0],
        0 if is_bits else result.data_ptr(),
        DTYPES[dtype],
        result.data_ptr() if is_bits else 0,
        0 if output_threshold is None else output_threshold.data_ptr(),
        activation_bits,
    )
    check_status(kernels.native.hf_stompp_binary_linear(record))
    return result


def _byte_on_cpu(kernels: NativeKernels, output: Tensor, input: Tensor, *layer: Any) -> Tensor:
    packed_weight, in_features, scale, bias, dtype = layer
    return _on_cpu(kernels, output, input, None, packed_weight, in_features, scale, bias, dtype, None, 8)


_CUDA_RECORD = struct.Struct("14q")  # struct hf_stompp_cuda_product


def _launch(
    native: cuda.NativeKernels,
    result: Tensor,
    bits: Tensor,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    output_threshold: Tensor | None = None,
) -> Tensor:
    operands = native.number, cuda.aligned(bits), cuda.aligned(packed_weight), scale, bias
    sizes = bits.shape[:-1].numel(), in_features, packed_weight.shape[0]
    outputs = (None, dtype, result) if result.dtype == torch.uint8 else (result, dtype, None)
    record = *operands, *sizes, *outputs, output_threshold
    native.call(native.native.hf_stompp_cuda_binary_linear, _CUDA_RECORD, bits.device, *record)
    return result


_UNPACKING = struct.Struct("7q")  # struct hf_stompp_cuda_unpacking

_SIGNS = {torch.int8: 0, torch.float8_e4m3fn: 1}  # enum hf_stompp_cuda_signs


def unpack_on_cuda(on: cuda.Device, bits: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """See [`~hf_stompp.ops.eight_bit.unpack`]: int8 or float8."""

    def launch(native: cuda.NativeKernels) -> Tensor:
        unpacked = bits.new_empty((bits.shape[0], 8 * bits.shape[1]), dtype=dtype)
        record = bits, bits.shape[0], features, unpacked, _SIGNS[dtype]
        native.call(native.native.hf_stompp_cuda_unpack_signs, _UNPACKING, bits.device, *record)
        return unpacked

    return on.attempt(launch, lambda: eight_bit.unpack(bits, features, dtype))


def _packed(on: cuda.Device, input: Tensor, threshold: Tensor | None) -> Tensor:
    if input.dtype == torch.uint8:
        return input
    return signs.on_cuda(on, signs.empty_packing(input), input, threshold)[0]


def _in_pytorch(on: cuda.Device, bits: Tensor, *layer: Any) -> Tensor:
    if on.product == "float32":
        return binary_linear(bits, None, *layer)
    return eight_bit.binary_linear(on.product, partial(unpack_on_cuda, on), bits, *layer)


def _linear_on_cuda(on: cuda.Device, output: Tensor, input: Tensor, threshold: Tensor | None, *layer: Any) -> Tensor:
    bits = _packed(on, input, threshold)
    return on.attempt(
        lambda native: _launch(native, output, bits, *layer),
        lambda: _in_pytorch(on, bits, *layer),
        on.product == "bits",
    )


def _sign_on_cuda(on: cuda.Device, result: Tensor, input: Tensor, threshold: Tensor | None, *layer: Any) -> Tensor:
    bits = _packed(on, input, threshold)

    return on.attempt(
        lambda native: _launch(native, result, bits, *layer),
        lambda: _packed(on, _in_pytorch(on, bits, *layer[:-1]), layer[-1]),
        on.product == "bits",
    )


def _byte_on_cuda(on: cuda.Device, output: Tensor, *layer: Any) -> Tensor:
    # PyTorch makes its own.
    del output
    if on.product == "float32":
        return byte_linear(*layer)
    return eight_bit.byte_linear(partial(unpack_on_cuda, on), *layer)


declare(BINARY_LINEAR, _linear_meta, binary_linear, cpu=_on_cpu, cuda=_linear_on_cuda)
declare(BINARY_LINEAR_SIGN, _sign_meta, binary_linear_sign, cpu=_on_cpu, cuda=_sign_on_cuda)
declare(BYTE_LINEAR, _byte_meta, byte_linear, cpu=_byte_on_cpu, cuda=_byte_on_cuda)
