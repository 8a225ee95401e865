"""The format of packed bits, in plain PyTorch. Holds no operator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


ROW_ALIGNMENT = 256
"""Rows are padded to this many bits, so that a kernel may read whole vectors."""


def packed_bytes(in_features: int) -> int:
    """
    Bytes of one packed row.

    Args:
        in_features (`int`): number of bits.

    Returns:
        `int`: a multiple of 32, because rows are padded with zeros to a multiple of 256 bits.
    """
    return -(-in_features // ROW_ALIGNMENT) * (ROW_ALIGNMENT // 8)


def empty_bits(like: Tensor, features: int) -> Tensor:
    """Packed rows without values, one for each row of `like`."""
    return like.new_empty(*like.shape[:-1], packed_bytes(features), dtype=torch.uint8)


def plus_minus_one(above: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Signs as numbers.

    Args:
        above (`Tensor`): bool, of any shape.
        dtype (`torch.dtype`): of the result.

    Returns:
        `Tensor` of the shape of `above`: +1 where it is true, -1 elsewhere.
    """
    # torch.where takes about ten times as long on a CPU.
    return above.to(dtype).mul_(2).sub_(1)


def at_least(input: Tensor, threshold: Tensor | None) -> Tensor:
    """Whose bits are set: where the input is at or above the threshold, 0 when there is none."""
    return input >= 0 if threshold is None else input >= threshold


def pack_bools(bits: Tensor) -> Tensor:
    """Packs booleans, eight to a byte, least significant bit first; zero beyond the features."""
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


def unpack_bits(packed: Tensor, features: int) -> Tensor:
    """The bits of packed rows as uint8 of 0 and 1, of shape `(..., features)`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :features]


def unpack_signs(packed: Tensor, in_features: int) -> Tensor:
    """
    The signs in a packed weight.

    Args:
        packed (`Tensor` of shape `(..., packed_bytes(in_features))`): uint8.
        in_features (`int`): number of weights in a row.

    Returns:
        `Tensor` of shape `(..., in_features)`: float32, +1 where the bit is set and -1 elsewhere.
    """
    return unpack_bits(packed, in_features).float() * 2 - 1
