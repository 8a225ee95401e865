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


def pack_bits(weight: Tensor) -> Tensor:
    """
    Packs the signs of a weight, eight to a byte, least significant bit first; a bit is `w >= 0`.

    Args:
        weight (`Tensor` of shape `(rows, in_features)`): any real dtype.

    Returns:
        `Tensor` of shape `(rows, packed_bytes(in_features))`: uint8, zero beyond `in_features`.
    """
    rows, in_features = weight.shape
    bits = (weight >= 0).to(torch.uint8)
    bits = F.pad(bits, (0, 8 * packed_bytes(in_features) - in_features)).view(rows, -1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=weight.device)
    return (bits << shifts).sum(dim=-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, in_features: int) -> Tensor:
    """
    The signs in a packed weight.

    Args:
        packed (`Tensor` of shape `(rows, packed_bytes(in_features))`): uint8.
        in_features (`int`): number of weights in a row.

    Returns:
        `Tensor` of shape `(rows, in_features)`: float32, +1 where the bit is set and -1 elsewhere.
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


def binary_linear(signs: Tensor, weight_signs: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """
    `scale * (signs @ weight_signs.T) + bias`, the product being an exact integer.

    Sums of fewer than 2^24 terms of +-1 are exact in float32, in whatever order they are taken.

    Args:
        signs (`Tensor` of shape `(..., in_features)`): +-1, any floating dtype.
        weight_signs (`Tensor` of shape `(out_features, in_features)`): +-1.
        scale (`Tensor` of shape `(out_features,)`).
        bias (`Tensor` of shape `(out_features,)`, *optional*).

    Returns:
        `Tensor` of shape `(..., out_features)`: dtype of `signs`.
    """
    # Autocast would round the integers to bfloat16, which holds none above 256 exactly.
    with torch.autocast(signs.device.type, enabled=False):
        product = F.linear(signs.float(), weight_signs.float())
        product = product * scale.float()
        return (product if bias is None else product + bias.float()).to(signs.dtype)
