"""
Products of +-1 matrices in 8-bit types, by PyTorch's own matrix products: for GPUs without one-bit tensor cores, and
where no kernels of ours can be compiled.

Sums of fewer than 2^24 terms of +-1 are exact in int32. In float8 they are where the tensor cores keep that many bits
of a sum, which is tried out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .bits import plus_minus_one, unpack_signs
from .integers import quantize_rows, scale_sums


_SMALLEST_ROWS = 32
"""`torch._int_mm` takes no fewer than 17 on a GPU."""

_ALIGNMENT = 16
"""Columns of a product come in multiples of this many."""

_PROBE = (2048, 4096, 1024)
"""Rows, in_features and out_features of the product that is timed; sums of as many terms must be exact."""

_ROUNDS = 10


def _int8(signs: Tensor, weight_signs: Tensor) -> Tensor:
    return torch._int_mm(signs, weight_signs.T).float()


def _float8(signs: Tensor, weight_signs: Tensor) -> Tensor:
    one = torch.ones((), device=signs.device)
    return torch._scaled_mm(signs, weight_signs.T, one, one, out_dtype=torch.float32)


PRODUCTS: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
    "int8": (torch.int8, _int8),
    "float8": (torch.float8_e4m3fn, _float8),
}
"""Product by name: the dtype of the signs, and `(signs (rows, k), weight_signs (columns, k)) -> float32`."""


def unpack(bits: Tensor, features: int, dtype: torch.dtype) -> Tensor:
    """
    The signs in packed rows, and 0 beyond their features: uint8 of shape `(rows, packed_bytes(features))` becomes
    `dtype` of shape `(rows, 8 * packed_bytes(features))`.
    """
    signs = unpack_signs(bits, features)
    return F.pad(signs, (0, 8 * bits.shape[-1] - features)).to(dtype)


def binary_linear(
    product: str,
    unpack: Callable[[Tensor, int, torch.dtype], Tensor],
    bits: Tensor,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """
    [`~hf_stompp.ops.products.binary_linear`] on packed bits: one of [`PRODUCTS`] multiplies the signs that [`unpack`],
    or a kernel for it, makes of them.
    """
    # Sums of more terms than were tried out.
    signs_dtype, multiply = PRODUCTS["int8" if in_features > _PROBE[1] else product]
    shape = *bits.shape[:-1], packed_weight.shape[0]
    if 0 in shape:
        return bits.new_empty(shape, dtype=dtype)
    signs = unpack(bits.reshape(-1, bits.shape[-1]), in_features, signs_dtype)
    sums = _padded_product(multiply, signs, unpack(packed_weight, in_features, signs_dtype))
    return scale_sums(sums, scale, bias, dtype).view(shape)


def _padded_product(multiply: Callable[[Tensor, Tensor], Tensor], input: Tensor, weight_signs: Tensor) -> Tensor:
    """The product, of sizes that a GPU takes."""
    dtype, rows, columns = input.dtype, input.shape[0], weight_signs.shape[0]
    # Zeros, viewed as bytes since float8 has no padding of its own.
    missing_rows, missing_columns = max(0, _SMALLEST_ROWS - rows), -columns % _ALIGNMENT
    if missing_rows:
        input = F.pad(input.view(torch.uint8), (0, 0, 0, missing_rows)).view(dtype)
    if missing_columns:
        weight_signs = F.pad(weight_signs.view(torch.uint8), (0, 0, 0, missing_columns)).view(dtype)
    return multiply(input, weight_signs)[:rows, :columns]


def byte_linear(
    unpack: Callable[[Tensor, int, torch.dtype], Tensor],
    input: Tensor,
    packed_weight: Tensor,
    in_features: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[`~hf_stompp.ops.products.byte_linear`] in int8; [`unpack`], or a kernel for it, makes the signs."""
    shape = *input.shape[:-1], packed_weight.shape[0]
    if 0 in shape:
        return input.new_empty(shape, dtype=dtype)
    codes, code_scale = quantize_rows(input.reshape(-1, in_features))
    weight_signs = unpack(packed_weight, in_features, torch.int8)
    codes = F.pad(codes, (0, weight_signs.shape[-1] - in_features))
    sums = _padded_product(_int8, codes, weight_signs)
    return scale_sums(sums, scale, bias, dtype, code_scale).view(shape)


def _is_exact(product: str, device: torch.device) -> bool:
    """Whether the largest sums of the probe come out as the integers that they are."""
    dtype, multiply = PRODUCTS[product]
    (rows, in_features, _), out_features = _PROBE, _ALIGNMENT
    signs, weight_signs = torch.ones(rows, in_features), torch.ones(out_features, in_features)
    # Every sum from the largest downwards.
    flipped = torch.arange(rows) % in_features
    signs[torch.arange(in_features) < flipped[:, None]] = -1
    expected = (in_features - 2 * flipped).float()[:, None].expand(rows, out_features)
    return torch.equal(multiply(signs.to(device, dtype), weight_signs.to(device, dtype)).cpu(), expected)


def _seconds(product: str, device: torch.device) -> float:
    dtype, multiply = PRODUCTS[product]
    rows, in_features, out_features = _PROBE
    signs, weight_signs = (
        plus_minus_one(torch.rand(count, in_features, device=device) < 0.5, torch.float32).to(dtype)
        for count in (rows, out_features)
    )
    times = []
    with torch.cuda.device(device):
        for _ in range(_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            multiply(signs, weight_signs)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[_ROUNDS // 2]


def choose(device: torch.device, seconds: Callable[[str, torch.device], float] = _seconds) -> str | None:
    """The fastest exact product of a device, by measurement: a key of [`PRODUCTS`]; None if none runs there."""
    times: dict[str, float] = {}
    for product in PRODUCTS:
        try:
            if _is_exact(product, device):
                times[product] = seconds(product, device)
        # What a device lacks, PyTorch tells in errors of several kinds.
        except (RuntimeError, ValueError, NotImplementedError):
            continue
    return min(times, key=lambda product: times[product], default=None)


def why_not(product: str, device: torch.device) -> str | None:
    """Why a product cannot be used on a device; None if it can."""
    try:
        return None if _is_exact(product, device) else "its sums are not exact there"
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
