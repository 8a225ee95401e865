"""The bit format and the binary product in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


ROW_ALIGNMENT = 256
"""Rows are padded to this many bits, so that a kernel may read whole vectors."""


def packed_bytes(in_features: int) -> int:
    """Bytes of one packed row: `in_features` bits, padded with zeros to a multiple of 256 bits."""
    return -(-in_features // ROW_ALIGNMENT) * (ROW_ALIGNMENT // 8)


def plus_minus_one(above: Tensor, dtype: torch.dtype) -> Tensor:
    """+1 where a boolean tensor is true, -1 elsewhere."""
    # torch.where takes about ten times as long on a CPU.
    return above.to(dtype).mul_(2).sub_(1)


def _above(input: Tensor, threshold: Tensor | None) -> Tensor:
    return input >= 0 if threshold is None else input >= threshold


def pack_bools(bits: Tensor) -> Tensor:
    """
    Packs booleans, eight to a byte, least significant bit first.

    Args:
        bits (`Tensor` of shape `(..., features)`): bool.

    Returns:
        `Tensor` of shape `(..., packed_bytes(features))`: uint8, zero beyond `features`.
    """
    features = bits.shape[-1]
    padded = F.pad(bits.to(torch.uint8), (0, 8 * packed_bytes(features) - features)).unflatten(-1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (padded << shifts).sum(dim=-1, dtype=torch.uint8)


def pack_bits(weight: Tensor) -> Tensor:
    """
    Packs the signs of a weight; a bit is `w >= 0`.

    Args:
        weight (`Tensor` of shape `(rows, in_features)`): any real dtype.

    Returns:
        `Tensor` of shape `(rows, packed_bytes(in_features))`: uint8, zero beyond `in_features`.
    """
    return pack_bools(weight >= 0)


def pack_sign(input: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Packs the signs of a tensor relative to a threshold.

    Args:
        input (`Tensor` of shape `(..., features)`): any real dtype. NaN gives a clear bit.
        threshold (`Tensor` of shape `(features,)`, *optional*): 0 when not given.

    Returns:
        `tuple(Tensor, Tensor)`: bits, uint8 of shape `(..., packed_bytes(features))`, and the number of set bits of
            each row, int32 of shape `(...)`.
    """
    above = _above(input, threshold)
    return pack_bools(above), above.sum(dim=-1, dtype=torch.int32)


def unpack_signs(packed: Tensor, in_features: int) -> Tensor:
    """
    The signs in a packed weight.

    Args:
        packed (`Tensor` of shape `(..., packed_bytes(in_features))`): uint8.
        in_features (`int`): number of weights in a row.

    Returns:
        `Tensor` of shape `(..., in_features)`: float32, +1 where the bit is set and -1 elsewhere.
    """
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :in_features].float() * 2 - 1


def fold(
    weight_signs: Tensor, row_scale: Tensor, offset: Tensor, amplitude: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """
    Scale and bias of the integer product that equals a linear layer on two-level inputs and two-level weights.

    With inputs `offset + amplitude * s` (`s` = +-1), `sum_k row_scale * v_k * (offset_k + amplitude * s_k) + bias` is
    `(row_scale * amplitude) * sum_k v_k s_k + (bias + row_scale * sum_k v_k offset_k)`. Sums are in float64 and
    rounded once.

    Args:
        weight_signs (`Tensor` of shape `(out_features, in_features)`): +-1.
        row_scale (`Tensor` of shape `(out_features, 1)`).
        offset (`Tensor` of shape `(in_features,)` or `()`).
        amplitude (`Tensor` of shape `()`).
        bias (`Tensor` of shape `(out_features,)`, *optional*).

    Returns:
        `tuple(Tensor, Tensor)`: scale and bias, both float32 of shape `(out_features,)`.
    """
    row_scale = row_scale.double().flatten()
    constant = row_scale * (weight_signs.double() @ offset.double().expand(weight_signs.shape[-1]))
    if bias is not None:
        constant = constant + bias.double()
    return (row_scale * amplitude.double()).float(), constant.float()


def integer_linear(
    signs: Tensor, weight_signs: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """
    `scale * (signs @ weight_signs.T) + bias`, the product being an exact integer.

    Sums of fewer than 2^24 terms of +-1 are exact in float32, in whatever order they are taken.

    Args:
        signs (`Tensor` of shape `(..., in_features)`): +-1, any floating dtype.
        weight_signs (`Tensor` of shape `(out_features, in_features)`): +-1.
        scale (`Tensor` of shape `(out_features,)`).
        bias (`Tensor` of shape `(out_features,)`, *optional*).
        dtype (`torch.dtype`, *optional*): of the result; that of `signs` when not given.

    Returns:
        `Tensor` of shape `(..., out_features)`: rounded to float32 after the product with the scale and after the sum
            with the bias, then to `dtype`.
    """
    # Autocast would round the integers to bfloat16, which holds none above 256 exactly.
    with torch.autocast(signs.device.type, enabled=False):
        product = F.linear(signs.float(), weight_signs.float())
        product = product * scale.float()
        return (product if bias is None else product + bias.float()).to(dtype or signs.dtype)


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
        in_features (`int`): at least 1.
        scale (`Tensor` of shape `(out_features,)`): float32.
        bias (`Tensor` of shape `(out_features,)`, *optional*): float32.
        dtype (`torch.dtype`): of the result: float32, bfloat16 or float16.

    Returns:
        `Tensor` of shape `(..., out_features)`: of `dtype`.
    """
    if input.dtype == torch.uint8:
        signs = unpack_signs(input, in_features)
    else:
        signs = plus_minus_one(_above(input, threshold), torch.float32)
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
    return pack_bools(_above(output, output_threshold))
